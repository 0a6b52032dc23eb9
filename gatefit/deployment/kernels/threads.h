#pragma once

// Threads that share one piece of work after another. Between pieces that follow at once they stay awake; else they
// sleep, as the processor belongs to whatever engine runs between the blocks.

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
  // Call part(i) for each i in [0, count) on `threads` threads, the caller's among them. Who is free takes
  // the next one, so nobody waits for a thread that is not there yet. Where another caller has the threads: alone.
  template <typename Part>
  static void share(int64_t threads, int64_t count, const Part& part) {
    if (threads > 1 && count > 1) {
      Threads& all = get();
      if (!all.taken.test_and_set(std::memory_order_acquire)) {
        all.run(threads, count, [](const void* p, int64_t i) { (*static_cast<const Part*>(p))(i); }, &part);
        all.taken.clear(std::memory_order_release);
        return;
      }
    }
    for (int64_t i = 0; i < count; ++i) part(i);
  }

 private:
  using Call = void (*)(const void*, int64_t);
  static constexpr auto AWAKE = std::chrono::microseconds(60);

  std::atomic_flag taken = ATOMIC_FLAG_INIT;
  // How many parts the current work has, and which is next, in one word: whoever takes one by it takes it of this very
  // work, whose end then waits for it.
  std::atomic<uint64_t> state{0};
  std::atomic<int64_t> done{0}, wanted{1};
  Call call = nullptr;
  const void* part = nullptr;
  struct Other {
    pthread_t thread;
    std::atomic<bool> asleep{false};
    std::condition_variable work;
  };
  std::vector<std::unique_ptr<Other>> others;
  int avoided = -1;  // the processor that they keep away from
  std::mutex mutex;

  // Never destroyed: its threads end with the process. A forked process has none of them, and begins anew.
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
      while (int64_t(others.size()) + 1 < threads) {
        auto other = std::make_unique<Other>();
        std::thread one(&Threads::serve, this, other.get(), others.size() + 1);
        other->thread = one.native_handle();
        others.push_back(std::move(other));
        one.detach();
        avoided = -1;
      }
    } catch (const std::system_error&) {  // no more threads to be had: those that there are do it
    }
    if (avoided < 0) keep_away();
    call = it, part = with, done = 0, wanted = threads;
    state = uint64_t(count) << 32;
    for (int64_t i = 0; i < std::min<int64_t>(threads - 1, others.size()); ++i)
      if (others[i]->asleep) {
        keep_away();
        { std::lock_guard<std::mutex> lock(mutex); }
        others[i]->work.notify_one();
      }
    while (take()) {
    }
    for (int64_t turns = 0; done.load(std::memory_order_acquire) < count; ++turns)
      if (turns < 10000) pause();
      else std::this_thread::yield();
  }

  // Some systems let a thread wake up on the processor that woke it, where it would wait for its caller to be done.
  void keep_away() {
#ifdef __linux__
    const int here = sched_getcpu();
    cpu_set_t allowed;
    if (here < 0 || here == avoided || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    if (CPU_COUNT(&allowed) < 2) return;
    avoided = here;
    CPU_CLR(here, &allowed);
    for (const auto& other : others) pthread_setaffinity_np(other->thread, sizeof allowed, &allowed);
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

  void serve(Other* mine, int64_t me) {
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
