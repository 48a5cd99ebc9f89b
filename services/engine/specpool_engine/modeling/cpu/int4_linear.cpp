// y = x W^T + b with 4-bit weights on CPUs with AVX-512 VNNI: few rows, and as few bytes to read as possible.
//
// Groups of 32 inputs share a scale, in the weights and in every row of x, which is rounded to 8 bits. Products and
// sums within a group are exact integers, the groups' sums are float32 in their order: a row's result does not depend
// on M.
//
// Shapes: x [M, I], y [M, O], b [O] or null, all float32; I is a multiple of 32.
// W: for each 32 outputs and each group, 32 scales in float16, then 512 bytes of [4][2 halves of the outputs][16][4]:
// of the 8 inputs of each of the four, the low half of a byte has the first 4, the high half the others, plus 8.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr long kVector = 16;               // outputs in a register
constexpr long kHalves = 2;
constexpr long kBlock = kHalves * kVector;  // outputs whose weights lie together
constexpr long kGroup = 32;                // inputs with a scale of their own
constexpr long kScaleBytes = 2 * kBlock;
constexpr long kGroupBytes = kScaleBytes + kBlock * kGroup / 2;
constexpr long kPrefetch = 12288;  // bytes ahead: behind the arithmetic of a few rows, nearer requests come too late

struct Problem {
  const int8_t* x;       // passes of [I / 32][rows][32]
  const float* scales;   // passes of [I / 32][rows]
  const int32_t* zeros;  // the same: what the weights' offset of 8 adds to a group's sum, negated
  const uint8_t* weights;
  const float* bias;
  float* y;
  long I, O;
};

// Four inputs for all outputs, and products with them. As intrinsics, compilers load all of a group's inputs first, into
// registers that the sums need.
inline __attribute__((always_inline)) __m512i broadcast(const int8_t* inputs) {
  __m512i result;
  asm volatile("vpbroadcastd %1, %0" : "=v"(result) : "m"(*(const int8_t(*)[4])inputs));
  return result;
}

inline __attribute__((always_inline)) void add_products(__m512i& group, __m512i weights, __m512i inputs) {
  asm("vpdpbusd %2, %1, %0" : "+v"(group) : "v"(weights), "v"(inputs));
}

// A block's group for M rows.
template <int M>
inline __attribute__((always_inline)) void add_group(const uint8_t* w, const int8_t* x, const float* scales,
                                                     const int32_t* zeros, __m512 (&sums)[kHalves][M]) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512i group[kHalves][M];
#pragma GCC unroll 32
  for (int m = 0; m < M; m++) group[0][m] = group[1][m] = _mm512_set1_epi32(zeros[m]);
#pragma GCC unroll 32
  for (int i = 0; i < kGroup / 8; i++) {
    __m512i weights[2][kHalves];
#pragma GCC unroll 32
    for (int h = 0; h < kHalves; h++) {
      const uint8_t* packed = w + kScaleBytes + 64 * (kHalves * i + h);
      _mm_prefetch(packed + kPrefetch, _MM_HINT_T0);
      const __m512i both = _mm512_loadu_si512(packed);
      weights[0][h] = _mm512_and_si512(both, low);
      weights[1][h] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
#pragma GCC unroll 32
    for (int part = 0; part < 2; part++)
#pragma GCC unroll 32
      for (int m = 0; m < M; m++) {
        const __m512i inputs = broadcast(x + m * kGroup + 8 * i + 4 * part);
#pragma GCC unroll 32
        for (int h = 0; h < kHalves; h++) add_products(group[h][m], weights[part][h], inputs);
      }
  }
  __m512 of_weights[kHalves];
#pragma GCC unroll 32
  for (int h = 0; h < kHalves; h++)
    of_weights[h] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(w + 2 * kVector * h)));
#pragma GCC unroll 32
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 32
    for (int h = 0; h < kHalves; h++) {
      const __m512 scale = _mm512_mul_ps(of_weights[h], _mm512_set1_ps(scales[m]));
      sums[h][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(group[h][m]), scale, sums[h][m]);
    }
  }
}

// M rows from `row` on times one block of outputs. 2 M sums, 2 M of the group, weights and one input fit into 32
// registers up to M = 6; beyond that some sums wait in the first-level cache, which costs less than a second pass.
template <int M>
void multiply(const Problem& p, long row, long first) {
  const long num_groups = p.I / kGroup;
  const uint8_t* w = p.weights + first / kBlock * num_groups * kGroupBytes;
  const int8_t* x = p.x + row * p.I;
  const float* scales = p.scales + row * num_groups;
  const int32_t* zeros = p.zeros + row * num_groups;
  __m512 sums[kHalves][M];
#pragma GCC unroll 32
  for (int h = 0; h < kHalves; h++)
#pragma GCC unroll 32
    for (int m = 0; m < M; m++) sums[h][m] = _mm512_setzero_ps();
  for (long g = 0; g < num_groups; g++, w += kGroupBytes, x += M * kGroup, scales += M, zeros += M)
    add_group<M>(w, x, scales, zeros, sums);
#pragma GCC unroll 32
  for (int h = 0; h < kHalves; h++) {
    const long output = first + h * kVector;
    if (output >= p.O) return;
    const __mmask16 mask = p.O - output < kVector ? (1u << (p.O - output)) - 1 : 0xFFFFu;
    const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(mask, p.bias + output) : _mm512_setzero_ps();
#pragma GCC unroll 32
    for (int m = 0; m < M; m++)
      _mm512_mask_storeu_ps(p.y + (row + m) * p.O + output, mask, _mm512_add_ps(sums[h][m], bias));
  }
}

using Multiply = void (*)(const Problem&, long, long);
constexpr long kRows = 8;
constexpr Multiply kMultiply[kRows + 1] = {nullptr,     multiply<1>, multiply<2>, multiply<3>, multiply<4>,
                                           multiply<5>, multiply<6>, multiply<7>, multiply<8>};

// Nine rows are 5 + 4, not 8 + 1.
struct Passes {
  long M;

  long num() const { return (M + kRows - 1) / kRows; }
  long rows(long pass, long row) const { return (M - row + num() - pass - 1) / (num() - pass); }
};

// Every group of a row to 8 bits with its own scale, for a pass of `rows`, each at a place of its own in every group.
void round_inputs(const float* x, long num_groups, long rows, int8_t* rounded, float* scales, int32_t* zeros) {
  for (long g = 0; g < num_groups; g++, x += kGroup, rounded += rows * kGroup, scales += rows, zeros += rows) {
    const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + kVector);
    const __m512 sizes = _mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second));
    const float largest = std::max(1e-20f, _mm512_reduce_max_ps(sizes));
    const __m512 factor = _mm512_set1_ps(127.0f / largest);
    const __m512i integers[2] = {_mm512_cvtps_epi32(_mm512_mul_ps(first, factor)),
                                 _mm512_cvtps_epi32(_mm512_mul_ps(second, factor))};
    for (int part = 0; part < 2; part++)
      _mm_storeu_si128((__m128i*)(rounded + part * kVector), _mm512_cvtepi32_epi8(integers[part]));
    *scales = largest / 127.0f;
    *zeros = -8 * _mm512_reduce_add_epi32(_mm512_add_epi32(integers[0], integers[1]));
  }
}

}  // namespace

extern "C" void specpool_int4_linear(const float* x, const uint8_t* weights, const float* bias, float* y, long M,
                                     long I, long O, int num_threads) {
  const long num_groups = I / kGroup;
  std::vector<int8_t> rounded(M * I);
  std::vector<float> scales(M * num_groups);
  std::vector<int32_t> zeros(M * num_groups);
  const Passes passes{M};
  for (long pass = 0, row = 0; pass < passes.num(); pass++) {
    const long rows = passes.rows(pass, row), start = row * num_groups;
    for (long m = 0; m < rows; m++)
      round_inputs(x + (row + m) * I, num_groups, rows, rounded.data() + start * kGroup + m * kGroup,
                   scales.data() + start + m, zeros.data() + start + m);
    row += rows;
  }
  const Problem problem{rounded.data(), scales.data(), zeros.data(), weights, bias, y, I, O};
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_threads > 1)
  for (long first = 0; first < O; first += kBlock) {
    // Only the first pass reads the block from memory.
    for (long pass = 0, row = 0; pass < passes.num(); pass++) {
      const long rows = passes.rows(pass, row);
      kMultiply[rows](problem, row, first);
      row += rows;
    }
  }
}
