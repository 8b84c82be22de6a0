// The prefix cache: a radix tree whose nodes are full KV pages, shared by reference count.
//
// Single-threaded (engine thread). It decides which page holds which tokens and which page goes
// next; it moves no KV.
//
// DESIGN
//  A node stands for one full page of tokens after all the pages above it; roots are told apart by
//  cache salt. A hash table finds a child by the chained hash of the whole prefix (one hash per new
//  page); parent and tokens are compared as well, so a collision can never mix two texts.
//  refs counts the running sequences that use a node. Whoever uses a node uses its whole path, so
//  refs never grow downwards.
//  Nodes with refs 0 are idle and lie in a list by age: the device list while their KV is in a
//  device page, the host list when only a host page holds it. Sequences let go of their path
//  deepest node first; therefore a child always precedes its parent in its list, the oldest idle
//  node is always without children in that tier, and eviction takes the head of the list without
//  any search. The host tier only has nodes below device nodes or below other host nodes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace kt::sched {

// Chained page hashes: seed with root_hash(salt), then one page_hash per page.
uint64_t root_hash(uint64_t salt);
uint64_t page_hash(uint64_t parent_hash, const int32_t* tokens, int32_t page_size);

class PrefixTree {
 public:
  struct Node {
    uint64_t hash = 0;
    uint64_t salt = 0;       // compared at roots only
    int32_t parent = -1;     // node, -1 at a root
    int32_t next = -1;       // chain of the hash bucket, or of unused nodes
    int32_t refs = 0;        // running sequences using it
    int32_t page = -1;       // device page, -1 when only the host has it
    int32_t host_page = -1;  // host page, -1 when only the device has it
    int32_t num_children = 0;
    int32_t older = -1;  // neighbours in the list of idle nodes
    int32_t newer = -1;
    uint64_t ready_plan = 0;  // first plan that may use it (later than the present while loading)
  };

  PrefixTree(int32_t num_pages, int32_t num_host_pages, int32_t page_size);

  const Node& node(int32_t id) const { return nodes_[static_cast<size_t>(id)]; }
  int32_t num_idle() const { return device_.size; }      // evictable device pages
  int32_t num_host_idle() const { return host_.size; }   // evictable host pages
  uint64_t num_removed() const { return num_removed_; }  // tells whether remembered ids still hold

  // Loads what find() will touch for these hashes into the CPU cache.
  void prefetch(const uint64_t* hashes, int32_t count) const;
  // The child of `parent` (-1: a root of `salt`) with these tokens, or -1.
  int32_t find(int32_t parent, uint64_t salt, uint64_t hash, const int32_t* tokens) const;
  // Adds it with one reference; the tree owns `page` from now on.
  int32_t insert(int32_t parent, uint64_t salt, uint64_t hash, const int32_t* tokens, int32_t page);
  void acquire(int32_t id);
  void release(int32_t id);

  // The idle node to evict next from the device / the host, or -1.
  int32_t oldest_idle() const { return device_.head; }
  int32_t oldest_host_idle() const { return host_.head; }
  // Forgets an idle node without children.
  void remove(int32_t id);
  // The idle device node now lives in host_page; returns its device page.
  int32_t move_to_host(int32_t id, int32_t host_page);
  // The referenced host node now lives in device `page`, usable from ready_plan on; returns its
  // host page.
  int32_t move_to_device(int32_t id, int32_t page, uint64_t ready_plan);

  // Verifies every invariant above; `users` = references per node that sequences hold. O(nodes);
  // returns what is wrong or NULL.
  const char* check(const std::vector<int32_t>& users) const;
  int32_t max_nodes() const { return static_cast<int32_t>(nodes_.size()); }

 private:
  struct List {
    int32_t head = -1;  // oldest
    int32_t tail = -1;
    int32_t size = 0;
  };

  Node& at(int32_t id) { return nodes_[static_cast<size_t>(id)]; }
  int32_t* tokens_of(int32_t id) const {
    return tokens_.get() + static_cast<size_t>(id) * static_cast<size_t>(page_size_);
  }
  size_t bucket_of(uint64_t hash) const { return hash & (buckets_.size() - 1); }
  List& list_of(const Node& n) { return n.page >= 0 ? device_ : host_; }
  void append(int32_t id);
  void unlink(int32_t id);
  const char* check_list(const List& list, bool on_device) const;

  int32_t page_size_;
  std::vector<Node> nodes_;
  std::unique_ptr<int32_t[]> tokens_;  // page_size per node; untouched memory until a node is used
  std::vector<int32_t> buckets_;       // first node of each chain
  int32_t unused_ = -1;                // chain of unused nodes
  List device_;
  List host_;
  uint64_t num_removed_ = 0;
};

}  // namespace kt::sched
