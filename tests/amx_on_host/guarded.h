// Memory against pages that may not be touched, and what the emulated processor objected to.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels/amx_registers.h"

namespace quantopt {
namespace {  // registers are those of a translation unit

// Memory that ends where a page begins that may not be touched, of `bytes` rounded up to `unit`, filled with
// 0x55 or a copy.
class Guarded {
 public:
  explicit Guarded(int64_t bytes, const void* copy = nullptr, int64_t unit = 1) {
    const int64_t page = sysconf(_SC_PAGESIZE), used = (bytes + unit - 1) / unit * unit;
    room_ = (used + page - 1) / page * page;
    void* const memory = mmap(nullptr, static_cast<size_t>(room_ + page), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    memory_ = static_cast<char*>(memory);
    if (mprotect(memory_ + room_, static_cast<size_t>(page), PROT_NONE) != 0) std::abort();
    size_ = static_cast<size_t>(room_ + page);
    at_ = memory_ + room_ - used;
    std::memset(at_, 0x55, static_cast<size_t>(used));
    if (copy != nullptr) std::memcpy(at_, copy, static_cast<size_t>(bytes));
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(memory_, size_); }
  template <class T = char>
  T* get() const {
    return reinterpret_cast<T*>(at_);
  }

 private:
  char *memory_, *at_;
  int64_t room_;
  size_t size_;
};

const char* objection() {
  if (amx_state().fault == nullptr && amx_state().configured) return "registers were not released";
  return amx_state().fault;
}

}  // namespace

}  // namespace quantopt
