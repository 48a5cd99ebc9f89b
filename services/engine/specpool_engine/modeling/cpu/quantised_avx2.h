// The quantised kernel for AVX2. Included by quantised_linear.cpp, within its namespace.

constexpr long kVector = 8;  // outputs in a register
constexpr int kVectors = kBlock / kVector;
constexpr int kStoredZero = kBits == 8 ? 0 : kZero;  // values of 8 bits are made signed: there is no room for more

template <int M>
using Sums = __m256[kVectors][M];

// Four inputs for all outputs. As an intrinsic, compilers load all of a group's inputs first, into registers that the
// sums need.
inline __attribute__((always_inline)) __m256i broadcast(const int8_t* inputs) {
  __m256i result;
  asm volatile("vpbroadcastd %1, %0" : "=x"(result) : "m"(*(const int8_t(*)[4])inputs));
  return result;
}

// Sums of 16 bits hold a group with weights of 4 bits: 8 times two products of at most 15 * 128. More bits are summed in
// 32 at once.
inline __attribute__((always_inline)) void add_products(__m256i& group, __m256i weights, __m256i inputs) {
  if (kBits == 4) {
    __m256i products;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(group), "=&x"(products) : "x"(weights), "x"(inputs));
    return;
  }
  if (kBits == 8) {
    inputs = _mm256_sign_epi8(inputs, weights);
    weights = _mm256_abs_epi8(weights);
  }
  const __m256i products = _mm256_maddubs_epi16(weights, inputs);
  group = _mm256_add_epi32(group, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}

inline __attribute__((always_inline)) __m256i loaded(const uint8_t* packed) {
  _mm_prefetch(packed + kPrefetch, _MM_HINT_T0);
  return _mm256_loadu_si256((const __m256i*)packed);
}

// Values of 8 inputs, 4 and 4, for the 8 outputs of a vector.
inline __attribute__((always_inline)) void load_values(const uint8_t* values, int i, int vector, __m256i* first,
                                                       __m256i* second) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i* const both[2] = {first, second};
  if (kBits == 8) {
    for (int part = 0; part < 2; part++)
      *both[part] = _mm256_xor_si256(loaded(values + 128 * (2 * i + part) + 32 * vector), _mm256_set1_epi8(-128));
    return;
  }
  const __m256i packed = loaded(values + 128 * i + 32 * vector);
  *first = _mm256_and_si256(packed, low);
  *second = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
  if (kUpperBits) {
    constexpr int kTogether = kUpperBits ? 8 / kUpperBits : 1;
    const int half = vector / 2;
    const __m256i upper = loaded(values + kLowerBytes + 64 * (4 * i / kTogether) + 32 * (vector % 2));
    const __m256i mask = _mm256_set1_epi8((1 << kUpperBits) - 1);
    for (int part = 0; part < 2; part++) {
      const int place = (4 * i + 2 * part + half) % kTogether;
      const __m256i bits = _mm256_and_si256(_mm256_srl_epi16(upper, _mm_cvtsi32_si128(kUpperBits * place)), mask);
      *both[part] = _mm256_or_si256(*both[part], _mm256_slli_epi16(bits, 4));
    }
  }
}

// The scales of a group, number `s` of kScales, or, after these, its leasts.
inline __attribute__((always_inline)) __m256 scales_of(const uint8_t* head, const uint8_t* w, int s, int vector) {
  const uint8_t* halves = (kGroups == 1 ? w : head) + kFactorBytes * (s / kScales) + 2 * kVector * vector;
  const __m256 factor = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)halves));
  if (kGroups == 1) return factor;
  const __m128i whole = _mm_loadl_epi64((const __m128i*)(w + kBlock * s + kVector * vector));
  return _mm256_mul_ps(factor, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(whole)));
}

// A block's group for M rows, a few vectors of outputs at a time, so that sums, weights and inputs fit into 16 registers.
template <int M>
inline __attribute__((always_inline)) void add_group(const uint8_t* head, const uint8_t* w, const int8_t* x,
                                                     const float* scales, const int32_t* zeros, const float* totals,
                                                     Sums<M>& sums) {
  constexpr int kAtOnce = M <= 5 ? 2 : 1;
  constexpr int kPartsOfScale = kParts / kScales;
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 1
  for (int first = 0; first < kVectors; first += kAtOnce) {
#pragma GCC unroll 1
    for (int s = 0; s < kScales; s++) {
      __m256i group[kAtOnce][M];
#pragma GCC unroll 32
      for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < kAtOnce; v++) group[v][m] = _mm256_setzero_si256();
#pragma GCC unroll 1
      for (int i = s * kPartsOfScale; i < (s + 1) * kPartsOfScale; i++) {
        __m256i weights[2][kAtOnce];
#pragma GCC unroll 2
        for (int v = 0; v < kAtOnce; v++)
          load_values(w + kScaleBytes, i, first + v, &weights[0][v], &weights[1][v]);
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++)
#pragma GCC unroll 32
          for (int m = 0; m < M; m++) {
            const __m256i inputs = broadcast(x + m * kGroup + 8 * i + 4 * part);
#pragma GCC unroll 2
            for (int v = 0; v < kAtOnce; v++) add_products(group[v][m], weights[part][v], inputs);
          }
      }
#pragma GCC unroll 2
      for (int v = 0; v < kAtOnce; v++) {
        const __m256 of_weights = scales_of(head, w, s, first + v);
#pragma GCC unroll 32
        for (int m = 0; m < M; m++) {
          const __m256i products = kBits == 4 ? _mm256_madd_epi16(group[v][m], ones) : group[v][m];
          const int32_t zero = kHasLeast ? 0 : zeros[s * M + m];
          const __m256 integers = _mm256_cvtepi32_ps(_mm256_add_epi32(products, _mm256_set1_epi32(zero)));
          const __m256 scale = _mm256_mul_ps(of_weights, _mm256_set1_ps(scales[m]));
          sums[first + v][m] = _mm256_fmadd_ps(integers, scale, sums[first + v][m]);
        }
      }
    }
    if (kHasLeast)
#pragma GCC unroll 2
      for (int v = 0; v < kAtOnce; v++) {
        const __m256 leasts = scales_of(head, w, kScales, first + v);
#pragma GCC unroll 32
        for (int m = 0; m < M; m++)
          sums[first + v][m] = _mm256_fmadd_ps(leasts, _mm256_set1_ps(totals[m]), sums[first + v][m]);
      }
  }
}

template <int M>
inline __attribute__((always_inline)) void store(const Problem& p, long row, long first, const Sums<M>& sums) {
  for (long place = 0; place < kVectors; place++) {
    const long output = first + place * kVector;
    if (output >= p.O) return;
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(std::min(p.O - output, kVector))), lanes);
    const __m256 bias = p.bias ? _mm256_maskload_ps(p.bias + output, mask) : _mm256_setzero_ps();
    for (int m = 0; m < M; m++)
      _mm256_maskstore_ps(p.y + (row + m) * p.O + output, mask, _mm256_add_ps(sums[place][m], bias));
  }
}

inline int32_t sum_of(__m256i integers) {
  __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
  sums = _mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums));
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 1);
}

// The 32 inputs at x to 8 bits: the largest one's size and the sums of both halves' integers.
inline void round_group(const float* x, int8_t* rounded, float* largest, int32_t* sums) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 values[4], sizes = _mm256_setzero_ps();
  for (int v = 0; v < 4; v++) {
    values[v] = _mm256_loadu_ps(x + 8 * v);
    sizes = _mm256_max_ps(sizes, _mm256_andnot_ps(sign, values[v]));
  }
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(sizes), _mm256_extractf128_ps(sizes, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  *largest = std::max(1e-20f, _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four))));
  const __m256 factor = _mm256_set1_ps(127.0f / *largest);
  __m256i integers[4];
  for (int v = 0; v < 4; v++) integers[v] = _mm256_cvtps_epi32(_mm256_mul_ps(values[v], factor));
  for (int half = 0; half < 2; half++) sums[half] = sum_of(_mm256_add_epi32(integers[2 * half], integers[2 * half + 1]));
  // Packing works within halves of registers.
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(integers[0], integers[1]),
                                           _mm256_packs_epi32(integers[2], integers[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)rounded, _mm256_permutevar8x32_epi32(bytes, order));
}
