// base.cu: types and machine instructions that the other CUDA files use. First in the NVRTC
// compilation; tests/native/emulated_cuda.h stands in for it where kernels run without a GPU. Needs
// sm_80: bf16 matrix instructions, copies that do not wait.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef signed char i8;
typedef long long i64;

// A launch's dynamic shared memory.
extern __shared__ __align__(16) u8 shared_memory[];

// Programmatic dependent launch: a kernel may start while the one before it ends. Every kernel
// calls wait_for_previous() before it touches what an earlier kernel wrote (weights and the step's
// metadata are not that) and before it writes anything; release_next() lets the next one start
// early. Both do nothing before sm_90, where kernels are launched one after another.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The f16 number in the low bits.
__device__ __forceinline__ float half_to_float(u32 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
  return f;
}

__device__ __forceinline__ u32 bf16_pair(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float bf16_low(u32 pair) { return __int_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(u32 pair) { return __int_as_float(pair & 0xffff0000); }

// 16 bytes from global to shared memory, both aligned; complete after end_copies() and
// wait_for_copies().
__device__ __forceinline__ void copy_16(u8* to, const u8* from) {
  const u32 address = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from)
               : "memory");
}
// Ends a group of copies of this thread.
__device__ __forceinline__ void end_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `left` (0 .. 3) of this thread's groups are under way.
__device__ __forceinline__ void wait_for_copies(int left) {
  switch (left) {
    case 0:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
  }
}

// d = c + a b: 16 x 32 bytes times 32 x 8 bytes in 32-bit integers. Lane 4 g + t holds of a rows
// g (a[0], a[2]) and g + 8 (a[1], a[3]), columns 4 t .. (a[0], a[1]) and 16 + 4 t .. (a[2], a[3]);
// of b column g, the same rows as a's columns; of c and d rows g (0, 1) and g + 8 (2, 3), columns
// 2 t and 2 t + 1.
__device__ __forceinline__ void multiply_tile(int (&d)[4], const u32 (&a)[4], uint2 b,
                                              const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
}

// d = c + a b: 16 x 8 numbers times 8 x 8, of 11 significant bits each. Lane 4 g + t holds of a
// rows g (a[0], a[2]) and g + 8 (a[1], a[3]), columns t (a[0], a[1]) and t + 4; of b column g, rows
// t and t + 4; of c and d what multiply_tile says.
__device__ __forceinline__ void multiply_floats(float (&d)[4], const float (&a)[4], float2 b,
                                                const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b.x)), "r"(__float_as_uint(b.y)), "f"(c[0]),
        "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// c += a b: 16 x 16 numbers times 16 x 8, in bf16. Lane 4 g + t holds of a rows g (a0, a2) and g +
// 8 (a1, a3), columns 2 t and 2 t + 1 (a0, a1) and 2 t + 8 and 2 t + 9; of b column g, the same
// rows as a's columns; of c what multiply_tile says.
__device__ __forceinline__ void multiply_add(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                             u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
