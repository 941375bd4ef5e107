// How fast threads can read memory: the ceiling that bandwidth-bound ops are compared with. Compiled when a bench starts.
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

typedef uint64_t Vec __attribute__((vector_size(64)));

// Several streams per thread keep more cache misses in flight than one: which number is best differs between machines.
template <int STREAMS>
uint64_t sum_of(const Vec* data, size_t count) {
  const size_t part = count / STREAMS / 4 * 4;
  Vec total[STREAMS][4] = {};
  for (size_t i = 0; i < part; i += 4)
    for (int s = 0; s < STREAMS; ++s)
      for (int j = 0; j < 4; ++j) {
        __builtin_prefetch(&data[s * part + i + j + 16], 0, 0);  // a line that is used once need not pass through all caches
        total[s][j] += data[s * part + i + j];
      }
  uint64_t sum = 0;
  for (auto& stream : total)
    for (auto& v : stream)
      for (int i = 0; i < 8; ++i) sum += v[i];
  return sum;
}

template <class Work>
double on_threads(int threads, const Work& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t)
    others.emplace_back([&, t] {
      ++ready;
      while (!go.load(std::memory_order_acquire)) {
      }
      work(t);
    });
  while (ready.load() < threads - 1) {
  }
  const auto begin = std::chrono::steady_clock::now();
  go.store(true, std::memory_order_release);
  work(0);
  for (auto& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

extern "C" {

void* bench_allocate(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  madvise(data, bytes, MADV_HUGEPAGE);
  memset(data, 1, bytes);
  return data;
}

void bench_free(void* data, size_t bytes) { munmap(data, bytes); }

// Seconds to read `bytes` once with `threads` threads; `bytes` must be a multiple of 64.
double bench_read(const void* data, size_t bytes, int threads, int streams, uint64_t* sum) {
  const size_t count = bytes / sizeof(Vec), part = count / threads;
  std::vector<uint64_t> sums(threads * 8);
  const double seconds = on_threads(threads, [&](int t) {
    const Vec* begin = static_cast<const Vec*>(data) + t * part;
    sums[t * 8] = streams == 1 ? sum_of<1>(begin, part) : streams == 2 ? sum_of<2>(begin, part) : sum_of<4>(begin, part);
  });
  for (int t = 0; t < threads; ++t) *sum += sums[t * 8];
  return seconds;
}
}
