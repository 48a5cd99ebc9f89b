// Copies keys or values [Hkv, T, D] into slots of one layer's cache [N * S, Hkv, D]. Strides and sizes are in bytes.

#include <cstdint>
#include <cstring>

extern "C" void specpool_write_kv(const char* rows, char* cache, const int64_t* slots, long num_tokens, long num_heads,
                                  long head_stride, long token_stride, long head_bytes) {
  for (long t = 0; t < num_tokens; t++)
    for (long head = 0; head < num_heads; head++)
      std::memcpy(cache + (slots[t] * num_heads + head) * head_bytes, rows + head * head_stride + t * token_stride,
                  head_bytes);
}
