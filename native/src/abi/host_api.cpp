// kt_host_query: the machine as one struct.
#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "host/features.h"
#include "host/topology.h"
#include "kt.h"

extern "C" int32_t kt_host_query(kt_host_info* out) {
  return kt::guard([&] {
    kt::require_struct(out, "kt_host_info");
    const kt::Topology topology = kt::read_topology();
    out->isa_mask = kt::isa_mask();
    out->best_isa = kt::best_isa();
    out->num_cpus = topology.num_cpus;
    out->num_cores = static_cast<int32_t>(topology.cores.size());
    out->num_nodes = topology.num_nodes;
    out->quota_millicpus = topology.quota_millicpus;
    out->l1d_bytes = topology.l1d_bytes;
    out->l2_bytes = topology.l2_bytes;
    out->l3_bytes = topology.l3_bytes;
    out->total_bytes = topology.total_bytes;
    out->available_bytes = topology.available_bytes;
    const std::string name = kt::cpu_name();
    std::memset(out->cpu_name, 0, sizeof(out->cpu_name));
    std::memcpy(out->cpu_name, name.data(), std::min(name.size(), sizeof(out->cpu_name) - 1));
    return KT_OK;
  });
}
