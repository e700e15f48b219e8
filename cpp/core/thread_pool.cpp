#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "vlm/parallel.hpp"

namespace vlm {
namespace {

struct Job {
  int64_t count, grain;
  RangeBody body;
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;  // of the first body that threw; read when all have left

  Job(int64_t n, int64_t step, RangeBody run, void* with) : count(n), grain(step), body(run), context(with) {}

  void work(int worker) {
    try {
      for (;;) {
        const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= count) return;
        body(context, begin, std::min(begin + grain, count), worker);
      }
    } catch (...) {
      next.store(count, std::memory_order_relaxed);  // what nobody has begun is left out
      if (!failed.test_and_set(std::memory_order_relaxed)) error = std::current_exception();
    }
  }
};

thread_local bool inside_body = false;

class Pool {
 public:
  // One caller at a time; false if another thread holds the pool.
  bool run(Job& job, int threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = threads - 1;
      joined_ = 0;
      running_ = 0;
      ++generation_;
    }
    wake_.notify_all();
    inside_body = true;
    job.work(0);
    inside_body = false;
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // late workers need not come any more
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
    return true;
  }

  int size() {
    std::lock_guard<std::mutex> lock(mutex_);
    return size_;
  }

 private:
  void grow(int workers) {
    std::lock_guard<std::mutex> lock(mutex_);
    while (size_ < workers) {
      try {
        std::thread(&Pool::serve, this).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: fewer workers give the same result
      }
      ++size_;
    }
  }

  void serve() {
    inside_body = true;
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (joined_ >= wanted_) continue;
      const int worker = ++joined_;
      ++running_;
      Job* job = job_;
      lock.unlock();
      job->work(worker);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int size_ = 0, wanted_ = 0, joined_ = 0, running_ = 0;
};

// Never destroyed: workers sleep in it until the process ends.
Pool* pool = nullptr;
std::once_flag pool_once;

void replace_pool_in_child() {
  pool = new Pool;  // the parent's threads and possibly held locks do not exist here
  inside_body = false;
}

Pool& the_pool() {
  std::call_once(pool_once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, replace_pool_in_child);
  });
  return *pool;
}

}  // namespace

void parallel_ranges(int64_t count, int64_t grain, int threads, RangeBody body, void* context) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = (count + grain - 1) / grain;
  threads = static_cast<int>(std::min<int64_t>(threads, pieces));
  if (threads > 1 && !inside_body) {
    Job job(count, grain, body, context);
    if (the_pool().run(job, threads)) {
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
  }
  for (int64_t begin = 0; begin < count; begin += grain) body(context, begin, std::min(begin + grain, count), 0);
}

int pool_size() { return the_pool().size(); }

}  // namespace vlm
