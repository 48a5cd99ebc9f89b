// Nanoseconds that a word takes from one core's cache to another's and back, halved: the least of a few series.
//
//     core_latency FIRST SECOND
//
// Cores below one L3 cache answer in some tens of nanoseconds, others in hundreds.

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <thread>

namespace {

constexpr int kSeries = 5;
constexpr int kTurns = 20000;

alignas(64) std::atomic<int> word{0};

void pin(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  if (sched_setaffinity(0, sizeof cores, &cores) != 0) {
    std::perror("sched_setaffinity");
    std::exit(2);
  }
}

void wait_for(int value) {
  while (word.load(std::memory_order_acquire) != value) {
  }
}

double series(int second) {
  word = 0;
  std::thread echo([second] {
    pin(second);
    for (int turn = 0; turn < kTurns; turn++) {
      wait_for(2 * turn + 1);
      word.store(2 * turn + 2, std::memory_order_release);
    }
  });
  const auto start = std::chrono::steady_clock::now();
  for (int turn = 0; turn < kTurns; turn++) {
    word.store(2 * turn + 1, std::memory_order_release);
    wait_for(2 * turn + 2);
  }
  const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
  echo.join();
  return spent.count() / kTurns / 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: core_latency FIRST SECOND\n");
    return 2;
  }
  pin(std::atoi(argv[1]));
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kSeries; i++) least = std::min(least, series(std::atoi(argv[2])));
  std::printf("%.0f\n", least);
}
