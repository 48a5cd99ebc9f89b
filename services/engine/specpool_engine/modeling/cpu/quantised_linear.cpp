// y = x W^T + b with weights of 4 to 8 bits on CPUs with AVX-512 VNNI or AVX2: few rows, and as few bytes to read as
// possible.
//
// Groups of 32 inputs have scales of their own, in the weights and in every row of x, which is rounded to 8 bits.
// Products and sums within a group are exact integers, the groups' sums are float32 in their order: a row's result does
// not depend on M, nor on the instructions.
//
// A weight is scale * (value - zero), or scale * value + least where SPECPOOL_ZERO is 0; values are from 0 to
// 2^SPECPOOL_BITS - 1. With SPECPOOL_GROUPS of 1 a group has its scale (and its least) in float16; otherwise so many
// groups are a super-block with two such factors, and the group has whole numbers of 8 bits times these. With
// SPECPOOL_SCALES of 2 each half of a group has its own.
//
// Shapes: x [M, I], y [M, O], b [O] or null, all float32; I is a multiple of 32, or of a super-block.
// W: for each 32 outputs and each super-block its factors, then its groups, each
//   scales [SPECPOOL_SCALES][32], leasts [32], each if there are any;
//   8 bits: values [4][2][2 halves of the outputs][16][4], 8 inputs in each of the four; otherwise
//   the lower 4 bits of values [4][2 halves][16][4], in the low half of a byte those of the first 4 of 8 inputs;
//   upper bits, 1 or 2: of values in the order for 8 bits, byte by byte, so many in one as fit, the first one lowest.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kBits = SPECPOOL_BITS;
constexpr int kZero = SPECPOOL_ZERO;
constexpr int kGroups = SPECPOOL_GROUPS;
constexpr int kScales = SPECPOOL_SCALES;
constexpr bool kHasLeast = kZero == 0;

constexpr long kBlock = 32;  // outputs whose weights lie together
constexpr long kGroup = 32;  // inputs of a group
constexpr int kParts = 4;    // of a group, 8 inputs each
constexpr int kUpperBits = kBits == 8 ? 0 : kBits - 4;
constexpr long kFactorBytes = 2 * kBlock;
constexpr long kHeadBytes = kGroups == 1 ? 0 : (1 + kHasLeast) * kFactorBytes;
constexpr long kScaleBytes = kGroups == 1 ? (1 + kHasLeast) * kFactorBytes : (kScales + kHasLeast) * kBlock;
constexpr long kLowerBytes = kBlock * kGroup * (kBits == 8 ? 8 : 4) / 8;
constexpr long kGroupBytes = kScaleBytes + kLowerBytes + kBlock * kGroup * kUpperBits / 8;
constexpr long kSuperBytes = kHeadBytes + kGroups * kGroupBytes;
constexpr long kPrefetch = 12288;  // bytes ahead: behind the arithmetic of a few rows, nearer requests come too late

struct Problem {
  const int8_t* x;       // passes of [I / 32][rows][32]
  const float* scales;   // passes of [I / 32][rows]
  const int32_t* zeros;  // passes of [I / 32][kScales][rows]: what the weights' zero adds to a sum, negated
  const float* totals;   // passes of [I / 32][rows]: sum of a group's rounded inputs, times their scale
  const uint8_t* weights;
  const float* bias;
  float* y;
  long I, O;
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "quantised_avx512.h"
#else
#include "quantised_avx2.h"
#endif

// The sums of M rows from `row` on with one block of outputs.
template <int M, typename Sums>
inline __attribute__((always_inline)) void add_groups(const Problem& p, long row, long first, Sums& sums) {
  const long num_groups = p.I / kGroup;
  const uint8_t* head = p.weights + first / kBlock * (num_groups / kGroups) * kSuperBytes;
  const int8_t* x = p.x + row * p.I;
  const float* scales = p.scales + row * num_groups;
  const float* totals = p.totals + row * num_groups;
  const int32_t* zeros = p.zeros + row * num_groups * kScales;
  for (long super = 0; super < num_groups / kGroups; super++, head += kSuperBytes) {
    const uint8_t* w = head + kHeadBytes;
#pragma GCC unroll 1
    for (int g = 0; g < kGroups; g++, w += kGroupBytes) {
      add_group<M>(head, w, x, scales, zeros, totals, sums);
      x += M * kGroup, scales += M, totals += M, zeros += M * kScales;
    }
  }
}

template <int M>
void multiply(const Problem& p, long row, long first) {
  Sums<M> sums = {};
  add_groups<M>(p, row, first, sums);
  store<M>(p, row, first, sums);
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
void round_inputs(const float* x, long num_groups, long rows, int8_t* rounded, float* scales, int32_t* zeros,
                  float* totals) {
  for (long g = 0; g < num_groups; g++, x += kGroup, rounded += rows * kGroup, scales += rows, totals += rows) {
    float largest;
    int32_t sums[2];
    round_group(x, rounded, &largest, sums);
    *scales = largest / 127.0f;
    *totals = *scales * float(sums[0] + sums[1]);
    if (kScales == 1) sums[0] += sums[1];
    for (int s = 0; s < kScales; s++, zeros += rows) *zeros = -kStoredZero * sums[s];
  }
}

}  // namespace

extern "C" void specpool_quantised_linear(const float* x, const uint8_t* weights, const float* bias, float* y, long M,
                                          long I, long O, int num_threads) {
  const long num_groups = I / kGroup;
  std::vector<int8_t> rounded(M * I);
  std::vector<float> scales(M * num_groups), totals(M * num_groups);
  std::vector<int32_t> zeros(M * num_groups * kScales);
  const Passes passes{M};
  for (long pass = 0, row = 0; pass < passes.num(); pass++) {
    const long rows = passes.rows(pass, row), start = row * num_groups;
    for (long m = 0; m < rows; m++)
      round_inputs(x + (row + m) * I, num_groups, rows, rounded.data() + start * kGroup + m * kGroup,
                   scales.data() + start + m, zeros.data() + start * kScales + m, totals.data() + start + m);
    row += rows;
  }
  const Problem problem{rounded.data(), scales.data(), zeros.data(), totals.data(), weights, bias, y, I, O};
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
