// y = x W^T + b for bfloat16 on CPUs with AVX-512 bf16: weights are read once, in order, from one stream.
//
// Shapes: x [M, I], packed W [blocks of 32 outputs][I / 2][32 outputs][2], b [O] in float32 or null, y [M, O].
// Sums are float32 and added in the order of I, so a row's result does not depend on M.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr long kVector = 16;            // outputs in a register, two inputs of each
constexpr long kBlock = 2 * kVector;    // outputs whose weights lie together
constexpr long kPrefetch = 12288;  // bytes ahead: behind the arithmetic of a few rows, nearer requests come too late

struct Problem {
  const uint16_t* x;
  const uint16_t* weights;
  const float* bias;
  uint16_t* y;
  long I, O;
};

// M rows times one block of outputs, from `first` on. M * V sums, V weights and one input fit into 32 registers.
template <int M>
void multiply(const Problem& p, long row, long first) {
  constexpr int V = kBlock / kVector;
  __m512 sums[V][M];
#pragma GCC unroll 32
  for (int v = 0; v < V; v++)
#pragma GCC unroll 32
    for (int m = 0; m < M; m++) sums[v][m] = _mm512_setzero_ps();
  const uint16_t* x = p.x + row * p.I;
  const auto* w = reinterpret_cast<const char*>(p.weights + first * p.I);
  for (long i = 0; i < p.I; i += 2, w += 2 * sizeof(uint16_t) * kBlock) {
    __m512bh weights[V];
#pragma GCC unroll 32
    for (int v = 0; v < V; v++) {
      _mm_prefetch(w + 64 * v + kPrefetch, _MM_HINT_T0);
      weights[v] = (__m512bh)_mm512_loadu_si512(w + 64 * v);
    }
#pragma GCC unroll 32
    for (int m = 0; m < M; m++) {
      int pair;
      std::memcpy(&pair, x + m * p.I + i, sizeof pair);
      const __m512bh inputs = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 32
      for (int v = 0; v < V; v++) sums[v][m] = _mm512_dpbf16_ps(sums[v][m], weights[v], inputs);
    }
  }
#pragma GCC unroll 32
  for (int v = 0; v < V; v++) {
    const long output = first + v * kVector;
    if (output >= p.O) return;
    const __mmask16 mask = p.O - output < kVector ? (1u << (p.O - output)) - 1 : 0xFFFFu;
    const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(mask, p.bias + output) : _mm512_setzero_ps();
#pragma GCC unroll 32
    for (int m = 0; m < M; m++) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sums[v][m], bias));
      _mm256_mask_storeu_epi16(p.y + (row + m) * p.O + output, mask, (__m256i)rounded);
    }
  }
}

using Multiply = void (*)(const Problem&, long, long);
constexpr long kRows = 12;
constexpr Multiply kMultiply[kRows + 1] = {nullptr,     multiply<1>, multiply<2>, multiply<3>,  multiply<4>,
                                           multiply<5>, multiply<6>, multiply<7>, multiply<8>,  multiply<9>,
                                           multiply<10>, multiply<11>, multiply<12>};

}  // namespace

extern "C" void specpool_streamed_linear(const uint16_t* x, const uint16_t* weights, const float* bias, uint16_t* y,
                                         long M, long I, long O, int num_threads) {
  const Problem problem{x, weights, bias, y, I, O};
  // Thirteen rows are 7 + 6, not 12 + 1. Only the first pass reads the block from memory.
  const long passes = (M + kRows - 1) / kRows;
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_threads > 1)
  for (long first = 0; first < O; first += kBlock) {
    for (long pass = 0, row = 0; pass < passes; pass++) {
      const long rows = (M - row + passes - pass - 1) / (passes - pass);
      kMultiply[rows](problem, row, first);
      row += rows;
    }
  }
}
