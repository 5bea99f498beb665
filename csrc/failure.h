// The first exception that is thrown in a parallel region, which none may leave.
#pragma once
#include <exception>

namespace {

class Failure {
 public:
  // Calls f, and keeps what it throws.
  template <class F>
  void of(const F& f) {
    try {
      f();
    } catch (...) {
#pragma omp critical(ttt_failure)
      if (!first_) first_ = std::current_exception();
    }
  }

  // Throws what was kept. To be called behind the region.
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
};

}  // namespace
