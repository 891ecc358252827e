// How the tests' C functions launch kernels.
#pragma once

#include <exception>
#include <string>

#include "emulator.h"

namespace pyfused {

/// Null, or what the exception out of `function()` says, until the next call; no buffer stays exposed.
template <class Function>
const char* message_of(const Function& function) {
  static std::string message;
  const char* result = nullptr;
  try {
    function();
  } catch (const std::exception& error) {
    message = error.what();
    result = message.c_str();
  }
  emulator::clear();
  return result;
}

}  // namespace pyfused
