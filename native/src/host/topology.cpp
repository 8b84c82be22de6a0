#include "host/topology.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <utility>

namespace kt {
namespace {

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// First integer of a file, or fallback.
int64_t read_number(const std::string& path, int64_t fallback) {
  const std::string line = read_line(path);
  char* end = nullptr;
  const long long value = std::strtoll(line.c_str(), &end, 10);
  return end == line.c_str() ? fallback : static_cast<int64_t>(value);
}

// "0-3,8,10-11" -> the CPUs named.
std::vector<int32_t> parse_cpu_list(const std::string& text) {
  std::vector<int32_t> cpus;
  std::istringstream stream(text);
  std::string item;
  while (std::getline(stream, item, ',')) {
    char* end = nullptr;
    const long first = std::strtol(item.c_str(), &end, 10);
    if (end == item.c_str()) {
      continue;
    }
    const long last = *end == '-' ? std::strtol(end + 1, nullptr, 10) : first;
    for (long cpu = first; cpu <= last && cpu < 1 << 16; ++cpu) {
      cpus.push_back(static_cast<int32_t>(cpu));
    }
  }
  return cpus;
}

std::vector<int32_t> allowed_cpus() {
  std::vector<int32_t> cpus;
  // Large enough for 16384 CPUs; the fixed cpu_set_t stops at 1024.
  constexpr int kMaxCpus = 16384;
  cpu_set_t* set = CPU_ALLOC(kMaxCpus);
  if (set == nullptr) {
    return {0};
  }
  const size_t bytes = CPU_ALLOC_SIZE(kMaxCpus);
  if (sched_getaffinity(0, bytes, set) == 0) {
    for (int cpu = 0; cpu < kMaxCpus; ++cpu) {
      if (CPU_ISSET_S(static_cast<size_t>(cpu), bytes, set)) {
        cpus.push_back(cpu);
      }
    }
  }
  CPU_FREE(set);
  if (cpus.empty()) {
    cpus.push_back(0);
  }
  return cpus;
}

// CPU -> NUMA node as the kernel numbers it.
std::map<int32_t, int32_t> cpu_nodes() {
  std::map<int32_t, int32_t> nodes;
  const std::string root = "/sys/devices/system/node/";
  for (const int32_t node : parse_cpu_list(read_line(root + "online"))) {
    const std::string list = read_line(root + "node" + std::to_string(node) + "/cpulist");
    for (const int32_t cpu : parse_cpu_list(list)) {
      nodes[cpu] = node;
    }
  }
  return nodes;
}

// Path of this process in a cgroup hierarchy: controller "" is version 2.
std::string cgroup_path(const std::string& controller) {
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) {
      continue;
    }
    const std::string names = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool match = controller.empty() ? names == ",,"
                                          : names.find("," + controller + ",") != std::string::npos;
    if (match) {
      return line.substr(second + 1);
    }
  }
  return "/";
}

// The directories from a cgroup up to its root: a limit of any of them binds.
std::vector<std::string> cgroup_dirs(const std::string& root, std::string path) {
  std::vector<std::string> dirs;
  while (true) {
    dirs.push_back(root + (path == "/" ? "" : path));
    const size_t slash = path.find_last_of('/');
    if (path.empty() || path == "/" || slash == std::string::npos) {
      break;
    }
    path = slash == 0 ? "/" : path.substr(0, slash);
  }
  return dirs;
}

int32_t read_quota() {
  int64_t least = INT64_MAX;
  for (const std::string& dir : cgroup_dirs("/sys/fs/cgroup", cgroup_path(""))) {
    std::istringstream line(read_line(dir + "/cpu.max"));
    std::string quota;
    int64_t period = 0;
    if (line >> quota >> period && quota != "max" && period > 0) {
      least = std::min<int64_t>(least, std::strtoll(quota.c_str(), nullptr, 10) * 1000 / period);
    }
  }
  for (const std::string& dir : cgroup_dirs("/sys/fs/cgroup/cpu", cgroup_path("cpu"))) {
    const int64_t quota = read_number(dir + "/cpu.cfs_quota_us", -1);
    const int64_t period = read_number(dir + "/cpu.cfs_period_us", 0);
    if (quota > 0 && period > 0) {
      least = std::min(least, quota * 1000 / period);
    }
  }
  return least > INT32_MAX ? -1 : static_cast<int32_t>(std::max<int64_t>(least, 1));
}

int64_t meminfo(const std::string& key) {
  std::ifstream file("/proc/meminfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.compare(0, key.size(), key) == 0) {
      return std::strtoll(line.c_str() + key.size(), nullptr, 10) * 1024;
    }
  }
  return 0;
}

// Bytes this process's cgroups still allow. Reclaimable page cache counts as used there, so it is
// given back: the kernel drops it before it kills anybody.
int64_t cgroup_headroom() {
  int64_t least = INT64_MAX;
  const auto apply = [&](const std::string& dir, const char* limit_file, const char* usage_file,
                         const std::string& cache_key) {
    const int64_t limit = read_number(dir + limit_file, -1);
    const int64_t usage = read_number(dir + usage_file, -1);
    if (limit <= 0 || usage < 0 || limit >= INT64_MAX / 2) {
      return;
    }
    int64_t cache = 0;
    std::ifstream stat(dir + "/memory.stat");
    std::string key;
    int64_t value = 0;
    while (stat >> key >> value) {
      if (key == cache_key) {
        cache = value;
      }
    }
    least = std::min(least, std::max<int64_t>(limit - usage + cache, 0));
  };
  for (const std::string& dir : cgroup_dirs("/sys/fs/cgroup", cgroup_path(""))) {
    apply(dir, "/memory.max", "/memory.current", "inactive_file");
  }
  for (const std::string& dir : cgroup_dirs("/sys/fs/cgroup/memory", cgroup_path("memory"))) {
    apply(dir, "/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_inactive_file");
  }
  return least;
}

int32_t cache_bytes(int name) {
  const long bytes = sysconf(name);
  return bytes > 0 && bytes <= INT32_MAX ? static_cast<int32_t>(bytes) : 0;
}

}  // namespace

Topology read_topology() {
  Topology topology;
  const std::vector<int32_t> cpus = allowed_cpus();
  const std::map<int32_t, int32_t> nodes = cpu_nodes();
  topology.num_cpus = static_cast<int32_t>(cpus.size());

  std::set<std::pair<int64_t, int64_t>> seen;  // (package, core) already represented
  std::map<int32_t, int32_t> renumbered;
  for (const int32_t cpu : cpus) {
    const std::string dir = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    // Without the files every CPU counts as a core of its own.
    const int64_t package = read_number(dir + "physical_package_id", -1);
    const int64_t core = read_number(dir + "core_id", -1 - cpu);
    const auto node = nodes.find(cpu);
    const int32_t node_id = node == nodes.end() ? 0 : node->second;
    renumbered.emplace(node_id, 0);
    if (seen.emplace(package, core).second) {
      topology.cores.push_back({cpu, node_id});
    }
  }
  int32_t next = 0;
  for (auto& entry : renumbered) {
    entry.second = next++;
  }
  for (Core& core : topology.cores) {
    core.node = renumbered[core.node];
  }
  topology.num_nodes = next;
  std::sort(topology.cores.begin(), topology.cores.end(), [](const Core& x, const Core& y) {
    return std::make_pair(x.node, x.cpu) < std::make_pair(y.node, y.cpu);
  });

  topology.quota_millicpus = read_quota();
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  topology.l1d_bytes = cache_bytes(_SC_LEVEL1_DCACHE_SIZE);
  topology.l2_bytes = cache_bytes(_SC_LEVEL2_CACHE_SIZE);
  topology.l3_bytes = cache_bytes(_SC_LEVEL3_CACHE_SIZE);
#endif
  topology.total_bytes = meminfo("MemTotal:");
  topology.available_bytes = std::min(meminfo("MemAvailable:"), cgroup_headroom());
  return topology;
}

int32_t default_threads(const Topology& topology) {
  int32_t threads = static_cast<int32_t>(topology.cores.size());
  // Rounded down: a worker beyond the quota only gets the others throttled in mid-phase.
  if (topology.quota_millicpus > 0) {
    threads = std::min(threads, topology.quota_millicpus / 1000);
  }
  return std::max(threads, 1);
}

}  // namespace kt
