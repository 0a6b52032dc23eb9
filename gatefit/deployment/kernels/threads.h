#pragma once

// Threads that share one piece of work after another. They stay awake for pieces that follow at once. Else they sleep,
// as the processor belongs to whatever engine runs between the blocks.

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

inline void pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

class Threads {
 public:
  // Call part(i) for each i in [0, count) on `threads` threads, the caller's among them. A thread that is free takes
  // the next part, so nobody waits for a thread that is not there yet. While another caller has the threads, this one
  // works alone.
  template <typename Part>
  static void share(int64_t threads, int64_t count, const Part& part) {
    if (threads > 1 && count > 1) {
      Threads& all = get();
      if (!all.busy.test_and_set(std::memory_order_acquire)) {
        all.run(threads, count, [](const void* p, int64_t i) { (*static_cast<const Part*>(p))(i); }, &part);
        all.busy.clear(std::memory_order_release);
        return;
      }
    }
    for (int64_t i = 0; i < count; ++i) part(i);
  }

 private:
  using Call = void (*)(const void*, int64_t);
  static constexpr auto AWAKE = std::chrono::microseconds(60);

  std::atomic_flag busy = ATOMIC_FLAG_INIT;  // some caller has the threads
  // How many parts the current work has, and which is next, in one word: a thread that takes a part by it takes one of
  // this very work, which then does not end before it.
  std::atomic<uint64_t> state{0};
  std::atomic<int64_t> done{0}, wanted{1};
  Call call = nullptr;
  const void* part = nullptr;
  struct Worker {
    pthread_t thread;
    std::atomic<bool> asleep{false};
    std::condition_variable work;
  };
  std::vector<std::unique_ptr<Worker>> workers;
  int avoided_cpu = -1;  // the processor that the workers keep away from; -1: none yet
  std::mutex mutex;

  // The threads of this process. They are never destroyed and end with it. A forked process has none of them, and
  // starts its own.
  static Threads& get() {
    static std::atomic<Threads*> now{nullptr};
    static const int registered = pthread_atfork(nullptr, nullptr, [] { now = nullptr; });
    (void)registered;
    Threads* mine = now;
    if (!mine) {
      Threads* made = new Threads;
      if (now.compare_exchange_strong(mine, made)) mine = made;
      else delete made;
    }
    return *mine;
  }

  static int64_t count_of(uint64_t s) { return s >> 32; }
  static int64_t next_of(uint64_t s) { return s & 0xffffffff; }

  void run(int64_t threads, int64_t count, Call it, const void* with) {
    try {
      while (int64_t(workers.size()) + 1 < threads) {
        auto worker = std::make_unique<Worker>();
        std::thread one(&Threads::serve, this, worker.get(), workers.size() + 1);
        worker->thread = one.native_handle();
        workers.push_back(std::move(worker));
        one.detach();
        avoided_cpu = -1;
      }
    } catch (const std::system_error&) {  // the system gives no more threads: the ones that are there do the work
    }
    if (avoided_cpu < 0) keep_away();
    call = it, part = with, done = 0, wanted = threads;
    state = uint64_t(count) << 32;
    for (int64_t i = 0; i < std::min<int64_t>(threads - 1, workers.size()); ++i)
      if (workers[i]->asleep) {
        keep_away();
        { std::lock_guard<std::mutex> lock(mutex); }
        workers[i]->work.notify_one();
      }
    while (take()) {
    }
    for (int64_t turns = 0; done.load(std::memory_order_acquire) < count; ++turns)
      if (turns < 10000) pause();
      else std::this_thread::yield();
  }

  // Keep the workers off the caller's processor. Some systems let a thread wake up on the processor that woke it, where
  // it would wait for its caller to be done.
  void keep_away() {
#ifdef __linux__
    const int cpu = sched_getcpu();
    cpu_set_t allowed;
    if (cpu < 0 || cpu == avoided_cpu || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    if (CPU_COUNT(&allowed) < 2) return;
    avoided_cpu = cpu;
    CPU_CLR(cpu, &allowed);
    for (const auto& worker : workers) pthread_setaffinity_np(worker->thread, sizeof allowed, &allowed);
#endif
  }

  // Do the next part, if there is one.
  bool take() {
    uint64_t now = state;
    while (next_of(now) < count_of(now))
      if (state.compare_exchange_weak(now, now + 1)) {
        call(part, next_of(now));
        done.fetch_add(1, std::memory_order_release);
        return true;
      }
    return false;
  }

  bool has_work(int64_t me) const {
    const uint64_t now = state;
    return next_of(now) < count_of(now) && me < wanted;
  }

  // What worker number `me`, from 1 on, does: spin for a while, sleep, and take parts.
  void serve(Worker* mine, int64_t me) {
    while (true) {
      const auto until = std::chrono::steady_clock::now() + AWAKE;
      while (!has_work(me) && std::chrono::steady_clock::now() < until)
        for (int i = 0; i < 8; ++i) pause();
      if (!has_work(me)) {
        std::unique_lock<std::mutex> lock(mutex);
        mine->asleep = true;
        mine->work.wait(lock, [&] { return has_work(me); });
        mine->asleep = false;
      }
      while (has_work(me) && take()) {
      }
    }
  }
};

}  // namespace
