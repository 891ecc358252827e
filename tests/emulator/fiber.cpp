#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <utility>

namespace pyfused::emulator {

namespace {

constexpr size_t kStackBytes = 256 * 1024;
const size_t kGuardBytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));

}  // namespace

Stack::Stack() {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK;
  void* mapping = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
  mprotect(mapping_, kGuardBytes, PROT_NONE);
}
Stack::Stack(Stack&& other) noexcept : mapping_(std::exchange(other.mapping_, nullptr)) {}
Stack::~Stack() {
  if (mapping_ != nullptr) munmap(mapping_, kGuardBytes + kStackBytes);
}

char* Stack::bottom() const { return mapping_ + kGuardBytes; }
size_t Stack::size() const { return kStackBytes; }

#ifdef PYFUSED_EMULATOR_UCONTEXT

void prepare(Fiber& fiber, const Stack& stack, size_t offset, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack.bottom();
  fiber.context.uc_stack.ss_size = stack.size() - offset;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_fibers(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

extern "C" void pyfused_switch_stacks(void** save, void* load);

// What a call preserves lies on the stack that is left. The end is no `ret`: the processor would expect the call that
// was made last, and it never is.
asm(R"(
.text
.hidden pyfused_switch_stacks
.globl pyfused_switch_stacks
.type pyfused_switch_stacks, @function
pyfused_switch_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  pop %rcx
  jmp *%rcx
.size pyfused_switch_stacks, . - pyfused_switch_stacks
)");

void prepare(Fiber& fiber, const Stack& stack, size_t offset, void (*entry)()) {
  // From the top: no caller, the address that the switch returns to, six registers.
  auto* top = reinterpret_cast<uintptr_t*>(stack.bottom() + stack.size() - offset / 16 * 16);
  for (int i = 1; i <= 8; ++i) top[-i] = 0;
  top[-2] = reinterpret_cast<uintptr_t>(entry);
  fiber.stack_pointer = top - 8;
}

void switch_fibers(Fiber& from, Fiber& to) { pyfused_switch_stacks(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace pyfused::emulator
