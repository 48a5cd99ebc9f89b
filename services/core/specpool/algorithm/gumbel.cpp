// Best tokens of rows by score + Gumbel noise on CPUs: the noise of noise.py bit for bit, in one pass per row.
//
// Every operation is rounded as there (compile without contraction); what is saved is torch's overhead for seventy
// operations on a few hundred numbers. Shapes as in noise.py: N rows, V vocabulary, B blocks of W = 64 tokens.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace {

constexpr std::uint64_t kTokenStep = 0x9E3779B97F4A7C15, kPositionStep = 0xD1B54A32D192ED03;
constexpr std::uint64_t kStreamStep = 0x8CB92BA72F3D8DD7, kBlockStep = 0xA0761D6478BD642F;
constexpr std::int64_t kBlock = 64;
constexpr double kMargin = 1e-9;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline std::uint64_t mix(std::uint64_t state) {
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB;
    return state ^ (state >> 31);
}

inline std::uint64_t hashed(std::uint64_t key, std::uint64_t number) { return mix(key + (number + 1) * kTokenStep); }

inline double logarithm(double x) {
    std::int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::int64_t exponent = (bits - 0x3FE6A09E667F3BCD) >> 52;
    const std::int64_t rest = bits - (exponent << 52);
    double mantissa;
    std::memcpy(&mantissa, &rest, sizeof mantissa);
    const double f = (mantissa - 1.0) / (mantissa + 1.0), s = f * f;
    double series = 1.0 / 21.0;
    for (int n = 9; n >= 0; --n) series = series * s + 1.0 / (2 * n + 1);
    const double e = static_cast<double>(exponent);
    return e * 0.6931471805599453 + (2.0 * f * series + e * 2.3190468138462996e-17);
}

inline double exponential(std::uint64_t bits) {
    const double unit = (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
    return -logarithm(1.0 - unit);
}

struct Row {
    const float* scores;
    std::uint64_t key;
    std::int64_t vocab_size;
};

using Sum = std::pair<double, std::int64_t>;

// The k best sums so far, the least of them first.
class Best {
  public:
    explicit Best(std::int64_t k) : k_(k) { heap_.reserve(k); }
    double least() const { return static_cast<std::int64_t>(heap_.size()) < k_ ? -kInfinity : heap_.front().first; }
    void add(double sum, std::int64_t token) {
        if (!(sum > least())) return;
        if (static_cast<std::int64_t>(heap_.size()) == k_) {
            std::pop_heap(heap_.begin(), heap_.end(), larger);
            heap_.pop_back();
        }
        heap_.emplace_back(sum, token);
        std::push_heap(heap_.begin(), heap_.end(), larger);
    }
    void write(std::int64_t* tokens, double* sums) {
        std::sort(heap_.begin(), heap_.end(), larger);
        for (std::int64_t i = 0; i < k_; ++i) {
            const bool is_there = i < static_cast<std::int64_t>(heap_.size());
            tokens[i] = is_there ? heap_[i].second : -1;
            sums[i] = is_there ? heap_[i].first : -kInfinity;
        }
    }

  private:
    static bool larger(const Sum& a, const Sum& b) { return a.first > b.first; }
    std::int64_t k_;
    std::vector<Sum> heap_;
};

// Largest score of each block; NaN where the block holds one.
void block_maxima(const Row& row, std::vector<float>& best) {
    for (std::size_t b = 0; b < best.size(); ++b) {
        const std::int64_t first = b * kBlock, last = std::min(first + kBlock, row.vocab_size);
        float most = -std::numeric_limits<float>::infinity();
        bool is_number = true;
        for (std::int64_t t = first; t < last; ++t) {
            most = row.scores[t] > most ? row.scores[t] : most;
            is_number &= row.scores[t] == row.scores[t];
        }
        best[b] = is_number ? most : std::numeric_limits<float>::quiet_NaN();
    }
}

void take_block(const Row& row, std::int64_t block, double lowest, Best& best) {
    const std::uint64_t bits = hashed(row.key ^ kBlockStep, block);
    const double least = exponential(bits) * (1.0 / kBlock);
    const std::int64_t first = block * kBlock, last = std::min(first + kBlock, row.vocab_size);
    const std::int64_t chosen = first + static_cast<std::int64_t>(bits & (kBlock - 1));
    for (std::int64_t t = first; t < last; ++t) {
        const double score = row.scores[t];
        if (!(score >= lowest)) continue;
        const double further = t == chosen ? 0.0 : exponential(hashed(row.key, t));
        best.add(score - logarithm(least + further), t);
    }
}

}  // namespace

extern "C" {

// scores [N, V] with `stride` numbers from row to row; seeds and positions [N]; tokens and sums [N, k].
// reach: tokens whose score is further below the row's best are left out; infinity: none is.
void specpool_gumbel_topk(const float* scores, std::int64_t stride, const std::int64_t* seeds,
                          const std::int64_t* positions, std::int64_t num_rows, std::int64_t vocab_size, std::int64_t k,
                          std::int64_t stream, double reach, std::int64_t* tokens, double* sums) {
    std::vector<float> maxima((vocab_size + kBlock - 1) / kBlock);
    std::vector<Sum> bounds;
    for (std::int64_t r = 0; r < num_rows; ++r) {
        std::uint64_t key = mix(static_cast<std::uint64_t>(seeds[r]) + kTokenStep);
        key = mix(key + static_cast<std::uint64_t>(stream + 1) * kStreamStep);
        key = mix(key + static_cast<std::uint64_t>(positions[r]) * kPositionStep);
        const Row row{scores + r * stride, key, vocab_size};
        block_maxima(row, maxima);
        double most = -kInfinity;
        for (float best : maxima)
            if (most == most && !(best <= most)) most = best;  // NaN stays
        double lowest = reach < kInfinity ? most - reach : -kInfinity;
        if (lowest == lowest) lowest = std::max(lowest, std::numeric_limits<double>::lowest());
        Best best(k);
        bounds.clear();
        for (std::size_t b = 0; b < maxima.size(); ++b)
            if (maxima[b] >= lowest) bounds.emplace_back(maxima[b], b);
        if (static_cast<std::int64_t>(bounds.size()) > k) {  // look into blocks by what they can hold at most
            for (Sum& bound : bounds)
                bound.first += kMargin - logarithm(exponential(hashed(key ^ kBlockStep, bound.second)) * (1.0 / kBlock));
            std::make_heap(bounds.begin(), bounds.end());
            for (auto end = bounds.end(); end != bounds.begin() && bounds.front().first >= best.least(); --end) {
                take_block(row, bounds.front().second, lowest, best);
                std::pop_heap(bounds.begin(), end);
            }
        } else {
            for (const Sum& bound : bounds) take_block(row, bound.second, lowest, best);
        }
        best.write(tokens + r * k, sums + r * k);
    }
}

}  // extern "C"
