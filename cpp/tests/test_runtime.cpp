// Thread pool (coverage of the range, nesting, several callers, fork), level switch.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <stdexcept>
#include <thread>

#include "check.hpp"
#include "vlm/parallel.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Visits {
  std::vector<std::atomic<int>> seen;
  std::atomic<int> highest_worker{0};
  explicit Visits(int64_t n) : seen(n) {}
  static void body(void* context, int64_t begin, int64_t end, int worker) {
    Visits& v = *static_cast<Visits*>(context);
    for (int64_t i = begin; i < end; ++i) ++v.seen[i];
    int before = v.highest_worker.load();
    while (before < worker && !v.highest_worker.compare_exchange_weak(before, worker)) {
    }
  }
  bool each_once() const {
    return std::all_of(seen.begin(), seen.end(), [](const std::atomic<int>& n) { return n == 1; });
  }
};

void every_index_runs_once() {
  for (int threads : {1, 2, 3, 8})
    for (int64_t count : {0, 1, 2, 7, 1000})
      for (int64_t grain : {1, 3, 64}) {
        Visits visits(count);
        parallel_ranges(count, grain, threads, Visits::body, &visits);
        check(visits.each_once() && visits.highest_worker < threads, "every index runs once");
      }
}

void nested_calls_run_in_the_caller() {
  Visits inner(4 * 50);
  parallel_ranges(4, 1, 4, [](void* context, int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      struct Shifted {
        Visits* visits;
        int64_t base;
      } shifted{static_cast<Visits*>(context), i * 50};
      parallel_ranges(50, 1, 4, [](void* c, int64_t b, int64_t e, int worker) {
        auto* s = static_cast<Shifted*>(c);
        Visits::body(s->visits, s->base + b, s->base + e, worker);
      }, &shifted);
    }
  }, &inner);
  check(inner.each_once() && inner.highest_worker == 0, "nested calls run in the caller");
}

void several_callers_at_once() {
  std::vector<std::thread> callers;
  std::atomic<int> good{0};
  for (int t = 0; t < 4; ++t)
    callers.emplace_back([&good] {
      for (int round = 0; round < 50; ++round) {
        Visits visits(200);
        parallel_ranges(200, 1, 3, Visits::body, &visits);
        good += visits.each_once();
      }
    });
  for (std::thread& caller : callers) caller.join();
  check(good == 200, "several callers at once");
}

// A body without memory, in whatever thread: the caller gets the exception, and the pool goes on.
void an_exception_comes_out() {
  for (int threads : {1, 3})
    for (int64_t bad : {int64_t{0}, int64_t{57}, int64_t{99}}) {
      bool caught = false;
      try {
        parallel_ranges(100, 1, threads, [](void* context, int64_t begin, int64_t, int) {
          if (begin == *static_cast<int64_t*>(context)) throw std::bad_alloc();
        }, &bad);
      } catch (const std::bad_alloc&) {
        caught = true;
      }
      check(caught, "an exception of a body comes out of the call");
      Visits visits(100);
      parallel_ranges(100, 1, threads, Visits::body, &visits);
      check(visits.each_once() && visits.highest_worker < threads, "the pool goes on after an exception");
    }
}

[[maybe_unused]] void child_of_a_fork_starts_afresh() {
  Visits before(100);
  parallel_ranges(100, 1, 3, Visits::body, &before);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a hang is a failure, not a stuck test
    const bool empty = pool_size() == 0;
    Visits visits(100);
    parallel_ranges(100, 1, 3, Visits::body, &visits);
    _exit(empty && visits.each_once() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child of a fork starts afresh");
  Visits after(100);
  parallel_ranges(100, 1, 3, Visits::body, &after);
  check(after.each_once(), "the parent of a fork goes on");
}

void unknown_levels_are_refused() {
  try {
    level_from_name("sse9");
    check(false, "unknown level is refused");
  } catch (const std::invalid_argument&) {
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    every_index_runs_once();
    nested_calls_run_in_the_caller();
    several_callers_at_once();
    an_exception_comes_out();
#ifndef __SANITIZE_THREAD__  // that sanitizer refuses threads in the child of a fork
    child_of_a_fork_starts_afresh();
#endif
    unknown_levels_are_refused();
  });
}
