#include "base/error.h"

#include <cstring>

namespace kt {
namespace {
// Fixed storage: reporting a failure must not allocate.
thread_local char message_buffer[1024] = "";
}  // namespace

void set_last_error(const char* message) noexcept {
  std::strncpy(message_buffer, message, sizeof(message_buffer) - 1);
  message_buffer[sizeof(message_buffer) - 1] = '\0';
}

const char* last_error() noexcept { return message_buffer; }

}  // namespace kt
