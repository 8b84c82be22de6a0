// The machine as this process may use it: cores inside its affinity mask, NUMA nodes, cgroup
// limits, memory. Read once at [setup] from /proc and /sys; a file that is missing or malformed
// gives the harmless answer (one node, no quota) instead of an error.
#pragma once

#include <cstdint>
#include <vector>

namespace kt {

struct Core {
  int32_t cpu = 0;   // first logical CPU of the physical core that we may run on
  int32_t node = 0;  // NUMA node, renumbered 0 .. num_nodes - 1
};

struct Topology {
  std::vector<Core> cores;  // sorted by node, then CPU
  int32_t num_cpus = 1;
  int32_t num_nodes = 1;
  int32_t quota_millicpus = -1;  // -1 = unlimited
  int32_t l1d_bytes = 0;
  int32_t l2_bytes = 0;
  int32_t l3_bytes = 0;
  int64_t total_bytes = 0;
  int64_t available_bytes = 0;
};

Topology read_topology();
// Physical cores, capped by the CPU quota; at least 1.
int32_t default_threads(const Topology& topology);

}  // namespace kt
