// Errors inside the library and their translation at the C boundary.
//
// Library code reports failures by throwing kt::Error; every extern "C" body runs inside guard(),
// which turns exceptions into a status and remembers the message for kt_last_error().
#pragma once

#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "kt.h"

namespace kt {

class Error : public std::runtime_error {
 public:
  Error(int32_t code, const std::string& message) : std::runtime_error(message), status(code) {}
  int32_t status;
};

[[noreturn]] inline void fail_argument(const std::string& message) {
  throw Error(KT_ERR_ARGUMENT, message);
}
[[noreturn]] inline void fail_unsupported(const std::string& message) {
  throw Error(KT_ERR_UNSUPPORTED, message);
}
[[noreturn]] inline void fail_state(const std::string& message) {
  throw Error(KT_ERR_STATE, message);
}
// A broken invariant of our own.
[[noreturn]] inline void fail_internal(const std::string& message) {
  throw Error(KT_ERR_INTERNAL, message);
}

// Stores the message of this thread's latest failure (truncated, never throws).
void set_last_error(const char* message) noexcept;
const char* last_error() noexcept;

// Runs body() -> int32_t, translating exceptions. The only catch-all of the library.
template <class Body>
int32_t guard(Body&& body) noexcept {
  try {
    return body();
  } catch (const Error& error) {
    set_last_error(error.what());
    return error.status;
  } catch (const std::bad_alloc&) {
    set_last_error("out of memory");
    return KT_ERR_MEMORY;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return KT_ERR_INTERNAL;
  } catch (...) {
    set_last_error("unknown failure");
    return KT_ERR_INTERNAL;
  }
}

template <class Handle>
void require_handle(const Handle* handle, const char* name) {
  if (handle == nullptr) {
    fail_argument(std::string(name) + " is NULL");
  }
}

// Input and output structs carry their own size; a mismatch means another ABI version.
template <class Struct>
void require_struct(const Struct* value, const char* name) {
  if (value == nullptr) {
    fail_argument(std::string(name) + " is NULL");
  }
  if (value->struct_size != sizeof(Struct)) {
    throw Error(KT_ERR_ABI, std::string(name) + ": struct_size is " +
                                std::to_string(value->struct_size) + ", this build expects " +
                                std::to_string(sizeof(Struct)));
  }
}

}  // namespace kt
