// A bounded queue from many producers to one consumer that may sleep on it. Producers push whole
// messages under a lock held for nanoseconds; the consumer takes everything at once.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace kt {

enum class WaitResult { kReady, kWoken, kTimeout };

template <class T>
class Ring {
 public:
  // [any] Appends when accept() says so; false otherwise. accept runs under the lock and may touch
  // what every other thread touches inside accept or locked() only. Memory is taken before accept
  // is asked, so that what it has noted never lacks its message.
  template <class Accept>
  bool push(T&& message, Accept&& accept) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      messages_.reserve(next_power(messages_.size() + 1));
      if (!accept()) {
        return false;
      }
      messages_.push_back(std::move(message));
    }
    ready_.notify_one();
    return true;
  }

  // [any] Makes the present or the next wait() return.
  void wake() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_woken_ = true;
    }
    ready_.notify_one();
  }

  // [consumer] Moves every message into `out` (emptied first).
  void take_all(std::vector<T>& out) {
    out.clear();
    const std::lock_guard<std::mutex> lock(mutex_);
    messages_.swap(out);
  }

  // [any] Runs body under the lock.
  template <class Body>
  void locked(Body&& body) {
    const std::lock_guard<std::mutex> lock(mutex_);
    body();
  }

  // [consumer] Sleeps until a message is queued, wake() was called or timeout_ns passed (-1 = no
  // limit). A wake-up is consumed only when it is what is returned.
  WaitResult wait(int64_t timeout_ns) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto is_over = [this] { return is_woken_ || !messages_.empty(); };
    if (timeout_ns < 0) {
      ready_.wait(lock, is_over);
    } else if (!ready_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), is_over)) {
      return WaitResult::kTimeout;
    }
    if (!messages_.empty()) {
      return WaitResult::kReady;
    }
    is_woken_ = false;
    return WaitResult::kWoken;
  }

 private:
  static size_t next_power(size_t count) {
    size_t power = 16;
    while (power < count) {
      power *= 2;
    }
    return power;
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::vector<T> messages_;
  bool is_woken_ = false;
};

}  // namespace kt
