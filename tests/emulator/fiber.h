// Fibers: functions on stacks of their own that hand control to each other.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(PYFUSED_EMULATOR_UCONTEXT)
#define PYFUSED_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace pyfused::emulator {

/// Where a fiber that does not run goes on.
struct Fiber {
#ifdef PYFUSED_EMULATOR_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
};

/// A stack with a guard page below it.
class Stack {
 public:
  Stack();
  Stack(Stack&& other) noexcept;
  ~Stack();

  char* bottom() const;
  size_t size() const;

 private:
  char* mapping_;
};

/// Makes `fiber` start in `entry`, which must not return, on the part of the stack below its last `offset` bytes.
void prepare(Fiber& fiber, const Stack& stack, size_t offset, void (*entry)());

/// Stops `from`, which runs, and goes on with `to`.
void switch_fibers(Fiber& from, Fiber& to);

}  // namespace pyfused::emulator
