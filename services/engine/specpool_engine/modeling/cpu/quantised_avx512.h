// The quantised kernel for AVX-512 VNNI. Included by quantised_linear.cpp, within its namespace.

constexpr long kVector = 16;  // outputs in a register
constexpr long kHalves = 2;
constexpr int kStoredZero = kZero;

template <int M>
using Sums = __m512[kHalves][M];

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

inline __attribute__((always_inline)) __m512i loaded(const uint8_t* packed) {
  _mm_prefetch(packed + kPrefetch, _MM_HINT_T0);
  return _mm512_loadu_si512(packed);
}

// Shifts of bytes by 4 to -3 to the left; what comes from the neighbours is masked by the caller.
inline __attribute__((always_inline)) __m512i shifted(__m512i bytes, int left) {
  switch (left) {
    case 4: return _mm512_slli_epi16(bytes, 4);
    case 3: return _mm512_slli_epi16(bytes, 3);
    case 2: return _mm512_slli_epi16(bytes, 2);
    case 1: return _mm512_slli_epi16(bytes, 1);
    case 0: return bytes;
    case -1: return _mm512_srli_epi16(bytes, 1);
    case -2: return _mm512_srli_epi16(bytes, 2);
    default: return _mm512_srli_epi16(bytes, 3);
  }
}

// Values of 8 inputs, 4 and 4, for all outputs.
inline __attribute__((always_inline)) void load_values(const uint8_t* values, int i, __m512i (&weights)[2][kHalves]) {
  const __m512i low = _mm512_set1_epi8(15);
  if (kBits == 8) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) weights[n / 2][n % 2] = loaded(values + 64 * (4 * i + n));
    return;
  }
#pragma GCC unroll 2
  for (int h = 0; h < kHalves; h++) {
    const __m512i both = loaded(values + 64 * (kHalves * i + h));
    weights[0][h] = _mm512_and_si512(both, low);
    weights[1][h] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
  }
  if (kUpperBits) {
    constexpr int kTogether = kUpperBits ? 8 / kUpperBits : 1;
    const __m512i upper = loaded(values + kLowerBytes + 64 * (4 * i / kTogether));
    const __m512i mask = _mm512_set1_epi8(((1 << kUpperBits) - 1) << 4);
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
      const int place = (4 * i + n) % kTogether;
      const __m512i bits = _mm512_and_si512(shifted(upper, 4 - kUpperBits * place), mask);
      weights[n / 2][n % 2] = _mm512_or_si512(weights[n / 2][n % 2], bits);
    }
  }
}

inline __attribute__((always_inline)) __m512 factors(const uint8_t* head, const uint8_t* w, int kind, int h) {
  const uint8_t* halves = (kGroups == 1 ? w : head) + kFactorBytes * kind + 2 * kVector * h;
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)halves));
}

// The scales of a group, number `s` of kScales, or, after these, its leasts.
inline __attribute__((always_inline)) __m512 scales_of(const uint8_t* head, const uint8_t* w, int s, int h) {
  const __m512 factor = factors(head, w, s / kScales, h);
  if (kGroups == 1) return factor;
  const __m128i whole = _mm_loadu_si128((const __m128i*)(w + kBlock * s + kVector * h));
  return _mm512_mul_ps(factor, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(whole)));
}

// A block's group for M rows. 2 M sums, 2 M of the group, weights and one input fit into 32 registers up to M = 6;
// beyond that some sums wait in the first-level cache, which costs less than a second pass.
template <int M>
inline __attribute__((always_inline)) void add_group(const uint8_t* head, const uint8_t* w, const int8_t* x,
                                                     const float* scales, const int32_t* zeros, const float* totals,
                                                     Sums<M>& sums) {
  constexpr int kPartsOfScale = kParts / kScales;
  __m512i group[kHalves][M];
#pragma GCC unroll 32
  for (int i = 0; i < kParts; i++) {
    if (i % kPartsOfScale == 0)
#pragma GCC unroll 32
      for (int m = 0; m < M; m++)
        group[0][m] = group[1][m] =
            kHasLeast ? _mm512_setzero_si512() : _mm512_set1_epi32(zeros[i / kPartsOfScale * M + m]);
    __m512i weights[2][kHalves];
    load_values(w + kScaleBytes, i, weights);
#pragma GCC unroll 32
    for (int part = 0; part < 2; part++)
#pragma GCC unroll 32
      for (int m = 0; m < M; m++) {
        const __m512i inputs = broadcast(x + m * kGroup + 8 * i + 4 * part);
#pragma GCC unroll 32
        for (int h = 0; h < kHalves; h++) add_products(group[h][m], weights[part][h], inputs);
      }
    if (i % kPartsOfScale == kPartsOfScale - 1) {
      __m512 of_weights[kHalves];
#pragma GCC unroll 32
      for (int h = 0; h < kHalves; h++) of_weights[h] = scales_of(head, w, i / kPartsOfScale, h);
#pragma GCC unroll 32
      for (int m = 0; m < M; m++)
#pragma GCC unroll 32
        for (int h = 0; h < kHalves; h++) {
          const __m512 scale = _mm512_mul_ps(of_weights[h], _mm512_set1_ps(scales[m]));
          sums[h][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(group[h][m]), scale, sums[h][m]);
        }
    }
  }
  if (kHasLeast)
#pragma GCC unroll 32
    for (int h = 0; h < kHalves; h++) {
      const __m512 leasts = scales_of(head, w, kScales, h);
#pragma GCC unroll 32
      for (int m = 0; m < M; m++) sums[h][m] = _mm512_fmadd_ps(leasts, _mm512_set1_ps(totals[m]), sums[h][m]);
    }
}

template <int M>
inline __attribute__((always_inline)) void store(const Problem& p, long row, long first, const Sums<M>& sums) {
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

// The 32 inputs at x to 8 bits: the largest one's size and the sums of both halves' integers.
inline void round_group(const float* x, int8_t* rounded, float* largest, int32_t* sums) {
  const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + kVector);
  const __m512 sizes = _mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second));
  *largest = std::max(1e-20f, _mm512_reduce_max_ps(sizes));
  const __m512 factor = _mm512_set1_ps(127.0f / *largest);
  const __m512i integers[2] = {_mm512_cvtps_epi32(_mm512_mul_ps(first, factor)),
                               _mm512_cvtps_epi32(_mm512_mul_ps(second, factor))};
  for (int half = 0; half < 2; half++) {
    _mm_storeu_si128((__m128i*)(rounded + half * kVector), _mm512_cvtepi32_epi8(integers[half]));
    sums[half] = _mm512_reduce_add_epi32(integers[half]);
  }
}
