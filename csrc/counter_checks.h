// Checks of the counters that say where the kernels read and write. They run before anything is written, and name what
// is wrong. bindings.cpp turns the exception into Python's ValueError.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace ttt {

// Rows that a reservoir can count: its random numbers have 32 bits, and the kernels on GPUs multiply in 63.
constexpr int64_t MOST_ROWS_SEEN = int64_t{1} << 31;

// A count of rows, of which `more` are to come. Null is no counter.
inline void check_counter(const char* name, const int64_t* counter, int64_t more = 0) {
  if (counter == nullptr) return;
  if (*counter < 0)
    throw std::invalid_argument(std::string(name) + " must be at least 0, got " + std::to_string(*counter));
  if (*counter > MOST_ROWS_SEEN - more)
    throw std::invalid_argument(std::string(name) + " must be at most 2^31 after " + std::to_string(more) +
                                " further rows, got " + std::to_string(*counter));
}

// Rows `at` to `at` + `rows` of a window.
inline void check_rows(const char* name, int64_t rows, int64_t at, int64_t window) {
  if (at < 0 || rows < 0 || rows > window - at)
    throw std::invalid_argument(std::string(name) + " must lie in the window of " + std::to_string(window) +
                                " rows, got " + std::to_string(rows) + " rows from row " + std::to_string(at) + " on");
}

}  // namespace ttt
