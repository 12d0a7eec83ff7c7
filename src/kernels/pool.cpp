#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "passes.h"

namespace headwater {
namespace {

constexpr int64_t kSpinNs = 20000;  // a waiter watches so long for the end of the last tasks before it sleeps

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// CPUs that this process may use, as far as the system tells.
std::vector<int> usable_cpus() {
  std::vector<int> found;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return found;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (CPU_ISSET(cpu, &set)) found.push_back(cpu);
  }
  return found;
}

struct Work {
  const std::function<bool(int64_t)>& task;
  const int64_t count;
  std::atomic<int64_t> next{0};

  void take_all() {
    const PlainFloats plain;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      if (!task(i)) next.store(count, std::memory_order_relaxed);
    }
  }
};

class Pool {
 public:
  const pid_t owner = getpid();

  // threads: the caller's among them. Where there is one for each CPU, each CPU has a helper that stays there, and one more is asked: that
  // of the caller's own is of no use. Else Linux may leave the only one queued behind another process while the next CPU falls idle.
  bool try_run(Work& work, int helpers, int threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    const int cpus = static_cast<int>(cpus_.size());
    const bool fills = cpus > 1 && threads >= cpus;
    if (fills) helpers++;
    {
      std::lock_guard<std::mutex> hold(lock_);
      grow(fills ? std::max(helpers, cpus) : helpers, fills);
      work_ = &work;
      wanted_ = helpers;
    }
    if (helpers == 1) wake_.notify_one();
    else wake_.notify_all();
    work.take_all();
    close();
    return true;
  }

 private:
  // Helpers that have not begun by now are not needed; those that have are waited for.
  void close() {
    {
      std::lock_guard<std::mutex> hold(lock_);
      work_ = nullptr;
      wanted_ = 0;
    }
    for (const int64_t limit = now_ns() + kSpinNs; active_.load(std::memory_order_acquire) > 0 && now_ns() < limit;) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> hold(lock_);
    done_.wait(hold, [this] { return active_.load(std::memory_order_acquire) == 0; });
  }

  void grow(int helpers, bool stay) {
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);  // signals are for the program's own threads
    try {
      for (; size_ < helpers; size_++) {
        const int cpu = stay && size_ < static_cast<int>(cpus_.size()) ? cpus_[static_cast<size_t>(size_)] : -1;
        std::thread([this, cpu] {
          if (cpu >= 0) stay_on(cpu);
          serve();
        }).detach();
      }
    } catch (const std::system_error&) {
      // Fewer threads than asked for: slower, and the same result.
    }
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
  }

  static void stay_on(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);  // where it may not, it runs anywhere
  }

  void serve() {
    std::unique_lock<std::mutex> hold(lock_);
    for (;;) {
      wake_.wait(hold, [this] { return wanted_ > 0; });
      wanted_--;
      Work* work = work_;
      active_.fetch_add(1, std::memory_order_relaxed);
      hold.unlock();
      work->take_all();
      hold.lock();
      if (active_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  const std::vector<int> cpus_ = usable_cpus();
  std::mutex turn_;  // held by the caller whose work it is
  std::mutex lock_;  // guards what follows
  std::condition_variable wake_, done_;
  Work* work_ = nullptr;
  int wanted_ = 0;  // helpers that may still begin
  int size_ = 0;
  std::atomic<int> active_{0};
};

// The pool of this process. A forked child has none of its parent's threads, so it gets a pool of its own; the
// copy of the parent's is left alone, for its locks may be held by threads that no longer are.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load(std::memory_order_acquire);
  while (found == nullptr || found->owner != getpid()) {
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
  }
  return *found;
}

}  // namespace

void run_tasks(int64_t count, int threads, const std::function<bool(int64_t)>& task) {
  Work work{task, count};
  const int helpers = static_cast<int>(std::min<int64_t>(threads, count)) - 1;
  if (helpers < 1 || !pool().try_run(work, helpers, threads)) work.take_all();
}

}  // namespace headwater
