// The int4 kernel for AVX-512 VNNI. Included by int4_linear.cpp, within its namespace.

constexpr long kVector = 16;  // outputs in a register
constexpr long kHalves = 2;

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

// The 32 inputs at x to 8 bits: the largest one's size and the sum of the integers.
inline void round_group(const float* x, int8_t* rounded, float* largest, int32_t* sum) {
  const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + kVector);
  const __m512 sizes = _mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second));
  *largest = std::max(1e-20f, _mm512_reduce_max_ps(sizes));
  const __m512 factor = _mm512_set1_ps(127.0f / *largest);
  const __m512i integers[2] = {_mm512_cvtps_epi32(_mm512_mul_ps(first, factor)),
                               _mm512_cvtps_epi32(_mm512_mul_ps(second, factor))};
  for (int part = 0; part < 2; part++)
    _mm_storeu_si128((__m128i*)(rounded + part * kVector), _mm512_cvtepi32_epi8(integers[part]));
  *sum = _mm512_reduce_add_epi32(_mm512_add_epi32(integers[0], integers[1]));
}
