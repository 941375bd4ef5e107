// Threads for kernels. They come from the binding (torch's own pool), so torch.set_num_threads is obeyed and kernels see no torch header.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <utility>

namespace llada {

// Hands out the items 0 .. count-1, each once, to whichever worker asks next.
class ItemQueue {
 public:
  explicit ItemQueue(int64_t count) : count_(count) {}
  bool next(int64_t& item) { return (item = next_.fetch_add(1, std::memory_order_relaxed)) < count_; }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_;
};

class Parallel {
 public:
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  using Run = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

  Parallel(Run run, int64_t num_threads) : run_(run), num_threads_(num_threads) {}

  int64_t num_threads() const { return num_threads_; }

  // f(begin, end) over parts of [0, count) of at least `grain` items.
  template <class F>
  void ranges(int64_t count, int64_t grain, F&& f) const {
    if (count <= 0) return;
    Call<F> call{&f, nullptr, {}};
    run_(0, count, grain, &Call<F>::range, &call);
    if (call.error) std::rethrow_exception(call.error);
  }

  // f(queue) once per worker; a worker takes items while queue.next(item). For items of unequal cost. Which worker computes an
  // item is not determined, so an item must write only its own outputs.
  template <class F>
  void items(int64_t count, F&& f) const {
    if (count <= 0) return;
    ItemQueue queue(count);
    auto worker = [&](int64_t, int64_t) { f(queue); };
    ranges(num_threads_ < count ? num_threads_ : count, 1, worker);
  }

 private:
  // torch's parallel_for loses the text of an exception, so it is carried round it.
  template <class F>
  struct Call {
    std::remove_reference_t<F>* f;
    std::exception_ptr error;
    std::atomic_flag failed;
    static void range(int64_t begin, int64_t end, void* context) {
      auto* call = static_cast<Call*>(context);
      try {
        (*call->f)(begin, end);
      } catch (...) {
        if (!call->failed.test_and_set()) call->error = std::current_exception();
      }
    }
  };

  Run run_;
  int64_t num_threads_;
};

}  // namespace llada
