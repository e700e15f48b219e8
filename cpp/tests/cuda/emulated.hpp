// Tests of CUDA kernels under emulation: every order of execution, planted faults, runs that must end with a message.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "../check.hpp"
#include "cuda/device.hpp"

namespace vlm::test {

// body(name of the mode) in each of {lazy, eager} x {forward, reversed}.
template <class Body>
void in_every_mode(Body body) {
  for (bool eager : {false, true})
    for (bool reversed : {false, true}) {
      emulation::mode = {eager, reversed, {}};
      body(emulation::mode.name());
    }
  emulation::mode = {};
}

// Leaves out, one at a time, each barrier and each wait for copies that `body` reaches. body() returns whether its
// results are right: it must be so without a fault, and in some mode not so with it.
template <class Body>
void every_barrier_is_needed(const std::string& name, Body body) {
  emulation::sites.clear();
  emulation::recording = true;
  in_every_mode([&](const std::string& mode) { check(body(), name + " " + mode); });
  emulation::recording = false;
  const auto sites = emulation::sites;
  check(!sites.empty(), name + " has barriers");
  for (const emulation::Site& site : sites) {
    bool noticed = false;
    for (bool eager : {false, true})
      for (bool reversed : {false, true}) {
        if (noticed) continue;
        emulation::mode = {eager, reversed, site};
        noticed = !body();
      }
    emulation::mode = {};
    check(noticed, name + ": nobody notices that the barrier at " + site.first + ":" + std::to_string(site.second) +
                       " is missing");
  }
}

// Runs body in a child process, which must abort and say `expected`.
template <class Body>
void must_abort(const std::string& expected, Body body) {
  int ends[2];
  if (pipe(ends) != 0) return check(false, "pipe");
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    body();
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char buffer[512];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) said.append(buffer, n);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFSIGNALED(status) && said.find(expected) != std::string::npos,
        "expected an abort that says '" + expected + "', got '" + said + "'");
}

// Runs body and reports the failures of all checks.
template <class Body>
int run_emulated(Body body) {
  body();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace vlm::test
