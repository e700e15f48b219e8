// What every entry of attention asks of its problem. Common units only.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "vlm/attention.hpp"

namespace vlm {

// Throws std::invalid_argument; `who` begins the message.
inline void check_problem(const AttentionProblem& p, const char* who) {
  const auto refuse = [who](const char* what) { throw std::invalid_argument(std::string(who) + ": " + what); };
  for (int64_t n : {p.batch, p.query_heads, p.key_heads, p.queries, p.keys, p.width, p.value_width})
    if (n < 0) refuse("negative size");
  if (p.queries > INT32_MAX || p.keys > INT32_MAX) refuse("over 2^31 queries or keys");
  if (p.key_heads == 0 || p.query_heads % p.key_heads != 0) refuse("query heads are not a multiple of key heads");
  if (!(p.softcap >= 0.0f)) refuse("the soft cap is negative");
  if (!(p.keep_share > 0.0f)) refuse("dropout leaves nothing");
  if (p.relative != nullptr && p.grid_columns > 0 &&
      (p.queries != p.keys || p.queries % p.grid_columns != 0 || p.grid_rows != p.queries / p.grid_columns))
    refuse("the grid of the relative bias does not fit queries and keys");
}

}  // namespace vlm
