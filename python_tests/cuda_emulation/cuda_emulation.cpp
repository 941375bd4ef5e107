// Compiled without _FORTIFY_SOURCE: longjmp between stacks is what fibers are.
#include "cuda_emulation.h"

#include <algorithm>
#include <csetjmp>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <ucontext.h>

namespace emulation {

Position now;

namespace {

constexpr size_t kStack = 128 * 1024, kFence = 64;
constexpr int kMaxThreads = 1024;

struct Warp {
  uint64_t slots[2][32];  // of this operation and of the one before, which slower lanes may still read
  int arrived = 0;
  int64_t generation = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf context;
  bool started = false, done = false;
  unsigned index = 0;
};

std::vector<std::unique_ptr<char[]>> stacks;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> dynamic;
const std::function<void()>* kernel_body = nullptr;
ucontext_t scheduler_start;
jmp_buf scheduler;
Fiber* current = nullptr;
std::string error;
bool failed = false, progress = false, refuse = false;
int running = 0, arrived = 0, order_kind = 0;
int64_t generation = 0, serial = 0;

void yield() {
  Fiber* self = current;
  if (_setjmp(self->context) == 0) _longjmp(scheduler, 1);
  current = self;
}

void enter() {  // once per fiber: it serves the next blocks and launches as well
  for (;;) {
    (*kernel_body)();
    current->done = progress = true;
    yield();
  }
}

void resume(Fiber& fiber) {
  current = &fiber;
  now.thread = {fiber.index, 0, 0};
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  swapcontext(&scheduler_start, &fiber.start);
}

std::vector<unsigned> order_of(size_t count, std::mt19937& random) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (order_kind == 1) std::reverse(order.begin(), order.end());
  if (order_kind > 1) std::shuffle(order.begin(), order.end(), random);
  return order;
}

void run_block(int threads, size_t dynamic_bytes, std::mt19937& random) {
  ++serial;
  running = threads;
  arrived = 0;
  warps.assign(size_t(threads) / 32, Warp{});
  dynamic.assign(dynamic_bytes + kFence, 0xff);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[size_t(t)];
    fiber.done = false;
    if (fiber.started) continue;
    fiber.index = unsigned(t);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks[size_t(t)].get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
  const std::vector<unsigned> order = order_of(size_t(threads), random);
  for (int left = threads; left > 0 && !failed;) {
    progress = false;
    for (unsigned t : order) {
      if (fibers[t].done) continue;
      resume(fibers[t]);
      if (failed) return;
      left -= fibers[t].done;
      running = left;
    }
    if (!progress && left > 0) {
      error = "a barrier or a warp operation is not reached by all threads";
      failed = true;
    }
  }
  for (size_t i = 0; i < kFence; ++i)
    if (dynamic[dynamic_bytes + i] != 0xff && !failed) error = "written behind the dynamic shared memory", failed = true;
}

}  // namespace

void check(bool good, const char* text) {
  if (good) return;
  error = text;
  failed = true;
  _longjmp(scheduler, 1);  // this fiber is never resumed
}

const char* last_error() { return error.c_str(); }
void fail_next() { refuse = true; }
void set_order(int order) { order_kind = order; }
void* dynamic_memory() { return dynamic.data(); }
int64_t block_serial() { return serial; }
void poison(void* memory, size_t size) { std::memset(memory, 0xff, size); }

void barrier() {
  const int64_t mine = generation;
  progress = true;
  if (++arrived == int(now.threads.x)) {
    arrived = 0;
    ++generation;
    return;
  }
  while (generation == mine) yield();
}

const uint64_t* exchange(uint64_t bits) {
  Warp& warp = warps[now.thread.x / 32];
  const int64_t mine = warp.generation;
  warp.slots[mine & 1][now.thread.x % 32] = bits;
  progress = true;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    while (warp.generation == mine) yield();
  }
  return warp.slots[mine & 1];
}

int run(int64_t blocks, int threads, size_t dynamic_bytes, const std::function<void()>& body) {
  failed = false;
  if (refuse) {
    refuse = false;
    error = "refused";
    return kFailed;
  }
  if (threads % 32 != 0 || threads < 32 || threads > kMaxThreads || blocks < 0 || blocks > INT32_MAX || dynamic_bytes > 48 * 1024) {
    error = "invalid launch";
    return kFailed;
  }
  if (fibers.empty()) fibers = std::vector<Fiber>(kMaxThreads);
  while (stacks.size() < size_t(threads)) stacks.emplace_back(new char[kStack]);
  kernel_body = &body;
  std::mt19937 random(static_cast<unsigned>(order_kind));
  now = Position{};
  now.threads.x = unsigned(threads);
  now.blocks.x = unsigned(blocks);
  for (unsigned block : order_of(size_t(blocks), random)) {
    now.block.x = block;
    run_block(threads, dynamic_bytes, random);
    if (!failed) continue;
    for (Fiber& fiber : fibers) fiber.started = false;  // some wait for ever
    return kFailed;
  }
  return 0;
}

}  // namespace emulation
