// The int4 kernel for AVX2. Included by int4_linear.cpp, within its namespace.

constexpr long kVector = 8;  // outputs in a register

// Four inputs for all outputs. As an intrinsic, compilers load all of a group's inputs first, into registers that the
// sums need.
inline __attribute__((always_inline)) __m256i broadcast(const int8_t* inputs) {
  __m256i result;
  asm volatile("vpbroadcastd %1, %0" : "=x"(result) : "m"(*(const int8_t(*)[4])inputs));
  return result;
}

inline __attribute__((always_inline)) void add_products(__m256i& group, __m256i weights, __m256i inputs) {
  __m256i products;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(group), "=&x"(products) : "x"(weights), "x"(inputs));
}

// A block's group for M rows, a few vectors of outputs at a time, so that sums, weights and inputs fit into 16 registers.
// Sums of 16 bits hold a group: 8 times two products of at most 15 * 128.
template <int M>
inline __attribute__((always_inline)) void add_group(const uint8_t* w, const int8_t* x, const float* scales,
                                                     const int32_t* zeros, __m256 (&sums)[kBlock / kVector][M]) {
  constexpr int kAtOnce = M <= 5 ? 2 : 1;
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 1
  for (int first = 0; first < kBlock / kVector; first += kAtOnce) {
    __m256i group[kAtOnce][M];
#pragma GCC unroll 32
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
      for (int v = 0; v < kAtOnce; v++) group[v][m] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int i = 0; i < kGroup / 8; i++) {
      const uint8_t* packed = w + kScaleBytes + 4 * kBlock * i + 4 * kVector * first;
      _mm_prefetch(packed + kPrefetch, _MM_HINT_T0);
      __m256i weights[2][kAtOnce];
#pragma GCC unroll 2
      for (int v = 0; v < kAtOnce; v++) {
        const __m256i both = _mm256_loadu_si256((const __m256i*)(packed + 4 * kVector * v));
        weights[0][v] = _mm256_and_si256(both, low);
        weights[1][v] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      }
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
      const int place = first + v;
      const __m256 of_weights = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(w + 2 * kVector * place)));
#pragma GCC unroll 32
      for (int m = 0; m < M; m++) {
        const __m256i products = _mm256_madd_epi16(group[v][m], ones);
        const __m256 integers = _mm256_cvtepi32_ps(_mm256_add_epi32(products, _mm256_set1_epi32(zeros[m])));
        const __m256 scale = _mm256_mul_ps(of_weights, _mm256_set1_ps(scales[m]));
        sums[place][m] = _mm256_fmadd_ps(integers, scale, sums[place][m]);
      }
    }
  }
}

// M rows from `row` on times one block of outputs.
template <int M>
void multiply(const Problem& p, long row, long first) {
  const long num_groups = p.I / kGroup;
  const uint8_t* w = p.weights + first / kBlock * num_groups * kGroupBytes;
  const int8_t* x = p.x + row * p.I;
  const float* scales = p.scales + row * num_groups;
  const int32_t* zeros = p.zeros + row * num_groups;
  __m256 sums[kBlock / kVector][M];
  for (auto& of_vector : sums)
    for (auto& sum : of_vector) sum = _mm256_setzero_ps();
  for (long g = 0; g < num_groups; g++, w += kGroupBytes, x += M * kGroup, scales += M, zeros += M)
    add_group<M>(w, x, scales, zeros, sums);
  for (long place = 0; place < kBlock / kVector; place++) {
    const long output = first + place * kVector;
    if (output >= p.O) return;
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(std::min(p.O - output, kVector))), lanes);
    const __m256 bias = p.bias ? _mm256_maskload_ps(p.bias + output, mask) : _mm256_setzero_ps();
    for (int m = 0; m < M; m++)
      _mm256_maskstore_ps(p.y + (row + m) * p.O + output, mask, _mm256_add_ps(sums[place][m], bias));
  }
}

// The 32 inputs at x to 8 bits: the largest one's size and the sum of the integers.
inline void round_group(const float* x, int8_t* rounded, float* largest, int32_t* sum) {
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
  __m256i total = _mm256_add_epi32(_mm256_add_epi32(integers[0], integers[1]), _mm256_add_epi32(integers[2], integers[3]));
  __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  sums = _mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums));
  *sum = _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 1);
  // Packing works within halves of registers.
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(integers[0], integers[1]),
                                           _mm256_packs_epi32(integers[2], integers[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)rounded, _mm256_permutevar8x32_epi32(bytes, order));
}
