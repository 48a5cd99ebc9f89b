// Causal attention over a paged KV cache that reads keys and values in the blocks where they lie.
//
// A result depends on its query, its position and its sequence's keys and values alone, bit for bit: every sum is added
// in the order of positions, in chunks that begin at multiples of kChunk, whatever is computed beside it.
//   scores   one lane per key: the products are added in the order of D
//   softmax  online, a step per chunk; one lane per position modulo kLanes
//   output   one lane per element: the keys are added in the order of their positions
// What is grouped, and how, is only a matter of speed: queries of a *tile* whose block tables name the same blocks read
// them together (a *run*), and so do the query heads of one key/value head.
//
// Shapes: query [T, H, D] with any strides, keys and values [N, S, Hkv, D], output [T, H, D]; R = H / Hkv.
// A *row* is one query of one head; rows of a tile are ordered [queries, R].

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SPECPOOL_AVX512 1
#endif
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

#if defined(SPECPOOL_AVX512)
constexpr int kLanes = 16;
constexpr int kMaxVectors = 4;  // kMaxRows * kMaxVectors sums, kMaxVectors operands and one factor fit the registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kMaxVectors = 2;
#else
constexpr int kLanes = 4;
constexpr int kMaxVectors = 2;
#endif
constexpr int kMaxRows = 6;
constexpr long kChunk = 256;                   // keys of one step of the softmax
constexpr long kScores = kChunk + kLanes;      // a row of scores; lanes after a run's last key are written, not read
constexpr long kTileRows = 64;                 // more rows read keys less often and need more scratch

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Vec splat(float x) {
#if defined(SPECPOOL_AVX512)
  return (Vec)_mm512_set1_ps(x);
#else
  return x - Vec{};
#endif
}

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

// a * b + c. Written out, so that it is rounded alike wherever it is inlined; the file is compiled without contraction.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(SPECPOOL_AVX512)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The larger; `b` if one is NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(SPECPOOL_AVX512)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// To 2e-7 relative, for x up to 88; never below the smallest normal number. NaN stays NaN.
inline Vec exponential(Vec x) {
  x = larger(splat(-87.3f), x);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Vec shifted = fma(x, splat(1.44269504f), magic);
  const Vec n = shifted - magic;
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  return (Vec)((Ints)p + ((Ints)shifted << 23));
}

inline Vec hyperbolic_tangent(Vec x) {
  const Vec z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const Vec small = fma(p * z, x, x);
  // e^-2|x| cannot overflow.
  const Vec size = larger(-x, x), power = exponential(size * splat(-2.0f));
  const Vec large = (splat(1.0f) - power) / (splat(1.0f) + power);
  return z < splat(0.390625f) ? small : x < Vec{} ? -large : large;
}

inline float largest_lane(Vec x) {
#if defined(SPECPOOL_AVX512)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float lanes[kLanes];
  store(lanes, x);
  return *std::max_element(lanes, lanes + kLanes);
#endif
}

inline float sum_of_lanes(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// ---- element types ----

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void from_float(float x, float* to) { *to = x; }

inline void from_float(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = x == x ? bits + 0x7FFF + (bits >> 16 & 1) : 0x7FC00000;
  to->bits = static_cast<uint16_t>(bits >> 16);
}

// `count` elements, at most kLanes, as floats; zeros after them.
template <class T>
inline Vec widen(const T* p, int count) {
#if defined(SPECPOOL_AVX512)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return (Vec)_mm512_maskz_loadu_ps(mask, p);
  else return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
#else
  if (__builtin_expect(count != kLanes, 0)) {
    float lanes[kLanes] = {};
    for (int i = 0; i < count; i++) lanes[i] = to_float(p[i]);
    return load(lanes);
  }
  if constexpr (sizeof(T) == 4) return load(p);
  Halves bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Vec)(__builtin_convertvector(bits, Ints) << 16);
#endif
}

// A dot product goes through D in words of 32 bits: a float, or two bfloat16 where the CPU multiplies these in pairs.
template <class T>
struct Words {
  static constexpr bool kPaired = false;
  static long count(long D) { return D; }
};

#if defined(SPECPOOL_AVX512) && defined(__AVX512BF16__)
template <>
struct Words<BFloat16> {
  static constexpr bool kPaired = true;
  static long count(long D) { return (D + 1) / 2; }
};
#endif

// The query's word `w`, for elements that are `stride` apart.
template <class T>
inline float query_word(const T* q, long stride, long w, long D) {
  if constexpr (Words<T>::kPaired) {
    const uint32_t low = q[2 * w * stride].bits, high = 2 * w + 1 < D ? q[(2 * w + 1) * stride].bits : 0;
    const uint32_t pair = high << 16 | low;
    float word;
    std::memcpy(&word, &pair, sizeof word);
    return word;
  } else {
    return to_float(q[w * stride]);
  }
}

// kLanes words of a key, from word `w` on; zeros after the last.
template <class T>
inline Vec key_words(const T* key, long w, long D) {
#if defined(SPECPOOL_AVX512)
  if constexpr (Words<T>::kPaired) {
    const long left = D - 2 * w;
    const __mmask32 mask = left >= 2 * kLanes ? ~0u : (1u << left) - 1;
    return (Vec)_mm512_maskz_loadu_epi16(mask, key + 2 * w);
  }
#endif
  return widen(key + w, static_cast<int>(std::min<long>(kLanes, D - w)));
}

// ---- sums of products ----

// Words of keys, transposed: [words][vectors * kLanes keys].
template <class T>
struct KeyWords {
  const float* data;
  long stride;

  template <int N>
  Vec get(long word, int n) const {
    return load(data + word * stride + n * kLanes);
  }
  static Vec multiply_add(Vec query, Vec key, Vec sum) {
#if defined(SPECPOOL_AVX512) && defined(__AVX512BF16__)
    if constexpr (Words<T>::kPaired) return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)key, (__m512bh)query);
#endif
    return fma(query, key, sum);
  }
};

// Values where they lie: `rows` has the address of each key's.
template <class T>
struct Values {
  const T* const* rows;
  long offset;
  int count;  // elements of the last vector

  template <int N>
  Vec get(long key, int n) const {
    return widen(rows[key] + offset + n * kLanes, n == N - 1 ? count : kLanes);
  }
  static Vec multiply_add(Vec weight, Vec value, Vec sum) { return fma(weight, value, sum); }
};

// sums[r] (+)= factors[r][begin .. end) times the operand's [begin .. end), which is not empty, in this order, one lane
// per column.
template <class Operand, bool kAdd, int R, int N>
void multiply(const Operand& operand, const float* factors, long factor_stride, long begin, long end, float* sums,
              long sum_stride) {
  Vec sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) sum[r][n] = kAdd ? load(sums + r * sum_stride + n * kLanes) : Vec{};
  long i = begin;
  do {
    Vec operands[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) operands[n] = operand.template get<N>(i, n);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec factor = splat(factors[r * factor_stride + i]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sum[r][n] = Operand::multiply_add(factor, operands[n], sum[r][n]);
    }
  } while (++i < end);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(sums + r * sum_stride + n * kLanes, sum[r][n]);
}

template <class Operand, bool kAdd, int R>
void multiply_rows(int vectors, const Operand& operand, const float* factors, long factor_stride, long begin, long end,
                   float* sums, long sum_stride) {
#define SPECPOOL_CASE(N) \
  case N: return multiply<Operand, kAdd, R, N>(operand, factors, factor_stride, begin, end, sums, sum_stride)
  switch (vectors) {
    SPECPOOL_CASE(1);
    SPECPOOL_CASE(2);
#if defined(SPECPOOL_AVX512)
    SPECPOOL_CASE(3);
    SPECPOOL_CASE(4);
#endif
  }
#undef SPECPOOL_CASE
}

template <class Operand, bool kAdd>
void multiply(int rows, int vectors, const Operand& operand, const float* factors, long factor_stride, long begin,
              long end, float* sums, long sum_stride) {
#define SPECPOOL_CASE(R) \
  case R: return multiply_rows<Operand, kAdd, R>(vectors, operand, factors, factor_stride, begin, end, sums, sum_stride)
  switch (rows) {
    SPECPOOL_CASE(1);
    SPECPOOL_CASE(2);
    SPECPOOL_CASE(3);
    SPECPOOL_CASE(4);
    SPECPOOL_CASE(5);
    SPECPOOL_CASE(6);
  }
#undef SPECPOOL_CASE
}

// Calls body(first, count) for parts of at most `most` that are about equal: seven rows are 4 + 3, not 6 + 1.
template <class Body>
inline void in_parts(long total, int most, const Body& body) {
  const long passes = (total + most - 1) / most;
  for (long pass = 0, first = 0; pass < passes; pass++) {
    const long count = (total - first + passes - pass - 1) / (passes - pass);
    body(first, static_cast<int>(count));
    first += count;
  }
}

#if defined(SPECPOOL_AVX512)
// 16 vectors of 16 words, transposed.
inline void transpose(__m512 (&x)[16]) {
  __m512 y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(y[i]), _mm512_castps_pd(y[i + 2])));
    x[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(y[i]), _mm512_castps_pd(y[i + 2])));
    x[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(y[i + 1]), _mm512_castps_pd(y[i + 3])));
    x[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(y[i + 1]), _mm512_castps_pd(y[i + 3])));
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    y[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; i++) {
    x[i] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0xdd);
  }
}
#endif

// kLanes keys into columns of `to` [words][stride].
template <class T>
void transpose_keys(const T* const* keys, long D, float* to, long stride) {
  const long words = Words<T>::count(D);
  for (long w = 0; w < words; w += kLanes) {
    const long count = std::min<long>(kLanes, words - w);
#if defined(SPECPOOL_AVX512)
    __m512 x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) x[i] = (__m512)key_words(keys[i], w, D);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      if (i < count) _mm512_storeu_ps(to + (w + i) * stride, x[i]);
#else
    for (int lane = 0; lane < kLanes; lane++)
      for (long i = 0; i < count; i++) to[(w + i) * stride + lane] = to_float(keys[lane][w + i]);
#endif
  }
}

}  // namespace

// What all layers of one forward share. Laid out as in native.py.
extern "C" struct SpecpoolAttentionForward {
  const int32_t* segments;  // [num_segments][4]: first packed token, tokens, position of the first, place in `tables`
  const int32_t* tables;    // the segments' block tables, one after the other
  const void* keys;         // [layers, N, S, Hkv, D]
  const void* values;
  int64_t num_segments;
  int64_t layer_size;  // elements
  int64_t block_size, num_kv_heads, head_dim;
  int64_t is_bfloat16;
};

extern "C" struct SpecpoolAttentionCall {
  const void* query;  // [T, H, D]
  void* output;       // [T, H, D]
  int64_t layer;
  int64_t head_stride, token_stride, element_stride;  // of the query
  int64_t num_heads;
  int64_t sliding_window;  // 0: none
  int64_t num_threads;
  float scaling;
  float softcap;  // 0: none
};

namespace {

using Forward = SpecpoolAttentionForward;
using Call = SpecpoolAttentionCall;

struct Query {
  const int32_t* blocks;
  long position;
  long first;  // position of the first key that it sees
  long token;
};

struct Run {
  long first_query, last_query;  // [first, last)
  long begin, end;               // positions
  const int32_t* blocks;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory of one thread, kept between calls.
class Scratch {
 public:
  float* floats(size_t count) {
    if (count > capacity_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
      if (!memory_) std::abort();
      capacity_ = count;
    }
    return memory_.get();
  }
  std::vector<Run> runs;

 private:
  std::unique_ptr<float, Free> memory_;
  size_t capacity_ = 0;
};

thread_local Scratch scratch;

inline long round_up(long x, long multiple) { return (x + multiple - 1) / multiple * multiple; }

// Attention of the queries of one tile, for the query heads of one key/value head.
template <class T>
class Tile {
 public:
  Tile(const Forward& forward, const Call& call, const Query* queries, long num_queries, long kv_head)
      : forward_(forward), call_(call), queries_(queries), num_queries_(num_queries), kv_head_(kv_head) {
    D_ = forward.head_dim;
    R_ = call.num_heads / forward.num_kv_heads;
    words_ = Words<T>::count(D_);
    width_ = round_up(D_, kLanes);
    const long rows = num_queries * R_;
    const long query_size = round_up(rows * words_, 16), score_size = round_up(rows * kScores, 16);
    const long key_size = round_up(round_up(words_, kLanes) * kMaxVectors * kLanes, 16);
    float* memory = scratch.floats(query_size + score_size + key_size + rows * (width_ + kLanes + 1));
    query_words_ = memory;
    scores_ = query_words_ + query_size;
    key_words_ = scores_ + score_size;
    outputs_ = key_words_ + key_size;
    sums_ = outputs_ + rows * width_;
    maxima_ = sums_ + rows * kLanes;
  }

  void attend() {
    load_queries();
    long first = queries_[0].first, last = queries_[0].position;
    for (long q = 1; q < num_queries_; q++) {
      first = std::min(first, queries_[q].first);
      last = std::max(last, queries_[q].position);
    }
    for (long chunk = first / kChunk * kChunk; chunk <= last; chunk += kChunk) attend_chunk(chunk);
    store_outputs();
  }

 private:
  void load_queries() {
    const long rows = num_queries_ * R_;
    std::fill(outputs_, outputs_ + rows * (width_ + kLanes), 0.0f);
    std::fill(maxima_, maxima_ + rows, -FLT_MAX);
    for (long row = 0; row < rows; row++) {
      const long token = queries_[row / R_].token, head = kv_head_ * R_ + row % R_;
      const T* q = static_cast<const T*>(call_.query) + token * call_.token_stride + head * call_.head_stride;
      float* to = query_words_ + row * words_;
      if (call_.element_stride == 1)
        for (long w = 0; w < words_; w++) to[w] = query_word(q, 1, w, D_);
      else
        for (long w = 0; w < words_; w++) to[w] = query_word(q, call_.element_stride, w, D_);
    }
  }

  void attend_chunk(long chunk) {
    std::vector<Run>& runs = scratch.runs;
    runs.clear();
    for (long q = 0; q < num_queries_;) {
      const long first = q;
      while (q < num_queries_ && sees(queries_[q], chunk)) q++;
      if (q > first) add_runs(first, q, chunk);
      else q++;
    }
    for (const Run& run : runs) score(run, chunk);
    for (long q = 0; q < num_queries_; q++)
      if (sees(queries_[q], chunk))
        for (long row = q * R_; row < (q + 1) * R_; row++) weigh(row, queries_[q], chunk);
    for (const Run& run : runs) add_values(run, chunk);
  }

  static bool sees(const Query& query, long chunk) { return query.position >= chunk && query.first < chunk + kChunk; }

  // Split the chunk's keys of queries [first, last), all of which see some: those that all have in common, and the rest.
  void add_runs(long first, long last, long chunk) {
    long begin = queries_[first].first, end = 0;
    long longest = first;
    for (long q = first; q < last; q++) {
      begin = std::min(begin, queries_[q].first);
      end = std::max(end, queries_[q].position + 1);
      if (queries_[q].position > queries_[longest].position) longest = q;
    }
    begin = std::max(begin, chunk);
    end = std::min(end, chunk + kChunk);
    long common = end;
    for (long q = first; q < last; q++) common = std::min(common, common_end(q, longest, begin, end));
    if (common > begin) scratch.runs.push_back({first, last, begin, common, queries_[longest].blocks});
    if (common < end) add_separate_runs(first, last, common, end);
  }

  // As few runs over [begin, end) as consecutive queries allow.
  void add_separate_runs(long first, long last, long begin, long end) {
    while (first < last) {
      long longest = first, next = first + 1;
      for (; next < last; next++) {
        const bool longer = queries_[next].position > queries_[longest].position;
        if (common_end(longer ? longest : next, longer ? next : longest, begin, end) < end) break;
        if (longer) longest = next;
      }
      const long run_end = std::min(end, queries_[longest].position + 1);
      if (run_end > begin) scratch.runs.push_back({first, next, begin, run_end, queries_[longest].blocks});
      first = next;
    }
  }

  // Where in [begin, end) query `q` stops to find its keys in the table of one that is not shorter.
  long common_end(long q, long other, long begin, long end) const {
    if (queries_[q].blocks == queries_[other].blocks) return end;
    const long last = std::min(end - 1, queries_[q].position);
    for (long block = begin / forward_.block_size; block * forward_.block_size <= last; block++)
      if (queries_[q].blocks[block] != queries_[other].blocks[block])
        return std::max(begin, block * forward_.block_size);
    return end;
  }

  // Addresses of the run's keys or values, of at most kChunk positions.
  void locate(const Run& run, const void* storage, const T** to) const {
    const T* layer = static_cast<const T*>(storage) + call_.layer * forward_.layer_size + kv_head_ * D_;
    const long stride = forward_.num_kv_heads * D_;
    long block = run.begin / forward_.block_size, slot = run.begin % forward_.block_size;
    for (long position = run.begin; position < run.end; block++, slot = 0) {
      const T* row = layer + (run.blocks[block] * forward_.block_size + slot) * stride;
      for (; slot < forward_.block_size && position < run.end; slot++, position++, row += stride) *to++ = row;
    }
  }

  // Products of the run's queries and keys.
  void score(const Run& run, long chunk) {
    constexpr long kGroup = kMaxVectors * kLanes;
    const T* keys[kChunk + kLanes];
    locate(run, forward_.keys, keys);
    const long num_keys = run.end - run.begin;
    for (long i = num_keys; i < round_up(num_keys, kLanes); i++) keys[i] = keys[num_keys - 1];
    for (long group = 0; group < num_keys; group += kGroup) {
      const int vectors = static_cast<int>((std::min(kGroup, num_keys - group) + kLanes - 1) / kLanes);
      const KeyWords<T> operand{key_words_, vectors * kLanes};
      for (int v = 0; v < vectors; v++)
        transpose_keys(keys + group + v * kLanes, D_, key_words_ + v * kLanes, operand.stride);
      float* scores = scores_ + run.begin - chunk + group;
      in_parts((run.last_query - run.first_query) * R_, kMaxRows, [&](long first, int count) {
        const long row = run.first_query * R_ + first;
        multiply<KeyWords<T>, false>(count, vectors, operand, query_words_ + row * words_, words_, 0, words_,
                                     scores + row * kScores, kScores);
      });
    }
  }

  // `x`, with `unseen` in lanes, of which the first is `i`, outside of [first, last].
  static Vec seen(Vec x, float unseen, long i, long first, long last) {
    if (i >= first && i + kLanes - 1 <= last) return x;
    Ints lanes;
    for (int lane = 0; lane < kLanes; lane++) lanes[lane] = static_cast<int32_t>(i + lane);
    return (lanes >= static_cast<int32_t>(first)) & (lanes <= static_cast<int32_t>(last)) ? x : splat(unseen);
  }

  // From the chunk's products to weights relative to the largest score so far, by which sums before are scaled, too.
  void weigh(long row, const Query& query, long chunk) {
    const long first = std::max(query.first - chunk, 0l), last = std::min(query.position - chunk, kChunk - 1);
    const long begin = first / kLanes * kLanes;
    float* scores = scores_ + row * kScores;
    Vec largest = splat(-FLT_MAX);
    for (long i = begin; i <= last; i += kLanes) {
      Vec x = load(scores + i) * splat(call_.scaling);
      if (call_.softcap != 0.0f)
        x = hyperbolic_tangent(x * splat(1.0f / call_.softcap)) * splat(call_.softcap);
      x = seen(x, -FLT_MAX, i, first, last);
      store(scores + i, x);
      largest = larger(x, largest);
    }
    const float before = maxima_[row];
    const float maximum = std::max(before, largest_lane(largest));
    const Vec scale = exponential(splat(before - maximum));
    Vec sum = load(sums_ + row * kLanes) * scale;
    for (long i = begin; i <= last; i += kLanes) {
      const Vec weights = seen(exponential(load(scores + i) - splat(maximum)), 0.0f, i, first, last);
      store(scores + i, weights);
      sum += weights;
    }
    store(sums_ + row * kLanes, sum);
    maxima_[row] = maximum;
    if (maximum == before) return;  // the scale is 1
    float* output = outputs_ + row * width_;
    for (long d = 0; d < width_; d += kLanes) store(output + d, load(output + d) * scale);
  }

  // Weighted sum of the run's values. Keys that only some rows see are added row by row: a value that a query does not
  // see must not touch it, not even times zero.
  void add_values(const Run& run, long chunk) {
    const T* located[kChunk];
    locate(run, forward_.values, located);
    const T* const* rows = located - (run.begin - chunk);
    const int vectors = static_cast<int>(width_ / kLanes);
    in_parts(vectors, kMaxVectors, [&](long vector, int count) {
      const long offset = vector * kLanes;
      const long left = D_ - offset - (count - 1) * kLanes;
      const Values<T> operand{rows, offset, static_cast<int>(std::min<long>(left, kLanes))};
      in_parts((run.last_query - run.first_query) * R_, kMaxRows, [&](long first, int num_rows) {
        add_values(run, chunk, operand, run.first_query * R_ + first, num_rows, count);
      });
    });
  }

  void add_values(const Run& run, long chunk, const Values<T>& operand, long row, int num_rows, int vectors) {
    const long begin = run.begin - chunk, end = run.end - chunk;
    long common_begin = begin, common_end = end;
    for (long q = row / R_; q <= (row + num_rows - 1) / R_; q++) {
      common_begin = std::max(common_begin, queries_[q].first - chunk);
      common_end = std::min(common_end, queries_[q].position + 1 - chunk);
    }
    const auto add = [&](long first, int count, long from, long to) {
      if (from < to)
        multiply<Values<T>, true>(count, vectors, operand, scores_ + first * kScores, kScores, from, to,
                                  outputs_ + first * width_ + operand.offset, width_);
    };
    const bool any = common_begin < common_end;
    if (any && common_begin == begin && common_end == end) return add(row, num_rows, begin, end);
    for (long r = row; r < row + num_rows; r++) {
      const long from = std::max(begin, queries_[r / R_].first - chunk);
      const long to = std::min(end, queries_[r / R_].position + 1 - chunk);
      add(r, 1, from, any ? common_begin : to);
    }
    if (!any) return;
    add(row, num_rows, common_begin, common_end);
    for (long r = row; r < row + num_rows; r++)
      add(r, 1, common_end, std::min(end, queries_[r / R_].position + 1 - chunk));
  }

  void store_outputs() {
    for (long row = 0; row < num_queries_ * R_; row++) {
      const long token = queries_[row / R_].token, head = kv_head_ * R_ + row % R_;
      T* to = static_cast<T*>(call_.output) + (token * call_.num_heads + head) * D_;
      const float scale = 1.0f / sum_of_lanes(load(sums_ + row * kLanes));
      const float* output = outputs_ + row * width_;
      for (long d = 0; d < D_; d++) from_float(output[d] * scale, to + d);
    }
  }

  const Forward& forward_;
  const Call& call_;
  const Query* queries_;
  long num_queries_, kv_head_;
  long D_, R_, words_, width_;
  float *query_words_, *scores_, *key_words_, *outputs_, *sums_, *maxima_;
};

std::vector<Query> list_queries(const Forward& forward, const Call& call) {
  std::vector<Query> queries;
  for (long s = 0; s < forward.num_segments; s++) {
    const int32_t* segment = forward.segments + 4 * s;
    for (long i = 0; i < segment[1]; i++) {
      const long position = segment[2] + i;
      const long first = call.sliding_window ? std::max<long>(0, position - call.sliding_window + 1) : 0;
      queries.push_back({forward.tables + segment[3], position, first, segment[0] + i});
    }
  }
  return queries;
}

// Where tiles begin, and the end. Queries of one tile share the first block of their sequences, or they share none.
std::vector<long> list_tiles(const Forward& forward, const Call& call, const std::vector<Query>& queries) {
  const long num_queries = static_cast<long>(queries.size());
  const long per_thread = (num_queries * forward.num_kv_heads + call.num_threads - 1) / call.num_threads;
  const long most = std::max(1l, std::min(kTileRows / (call.num_heads / forward.num_kv_heads), per_thread));
  std::vector<long> starts{0};
  for (long q = 1; q < num_queries; q++)
    if (q - starts.back() == most || queries[q].blocks[0] != queries[q - 1].blocks[0]) starts.push_back(q);
  starts.push_back(num_queries);
  return starts;
}

template <class T>
void attend(const Forward& forward, const Call& call) {
  const std::vector<Query> queries = list_queries(forward, call);
  const std::vector<long> starts = list_tiles(forward, call, queries);
  const long num_units = static_cast<long>(starts.size() - 1) * forward.num_kv_heads;
  const int num_threads = static_cast<int>(std::min<long>(call.num_threads, num_units));
#pragma omp parallel for num_threads(num_threads) schedule(dynamic) if (num_threads > 1)
  for (long unit = 0; unit < num_units; unit++) {
    const long tile = unit / forward.num_kv_heads, kv_head = unit % forward.num_kv_heads;
    Tile<T>(forward, call, queries.data() + starts[tile], starts[tile + 1] - starts[tile], kv_head).attend();
  }
}

}  // namespace

extern "C" void specpool_attend(const SpecpoolAttentionForward* forward, const SpecpoolAttentionCall* call) {
  if (forward->is_bfloat16) attend<BFloat16>(*forward, *call);
  else attend<float>(*forward, *call);
}
