// y = x W^T + b with 4-bit weights on CPUs with AVX-512 VNNI or AVX2: few rows, and as few bytes to read as possible.
//
// Groups of 32 inputs share a scale, in the weights and in every row of x, which is rounded to 8 bits. Products and
// sums within a group are exact integers, the groups' sums are float32 in their order: a row's result does not depend
// on M, nor on the instructions.
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

constexpr long kBlock = 32;  // outputs whose weights lie together
constexpr long kGroup = 32;  // inputs with a scale of their own
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

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "int4_avx512.h"
#else
#include "int4_avx2.h"
#endif

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
    float largest;
    int32_t sum;
    round_group(x, rounded, &largest, &sum);
    *scales = largest / 127.0f;
    *zeros = -8 * sum;
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
