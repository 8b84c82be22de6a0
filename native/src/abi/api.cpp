// Library-wide entry points: version, build information, last error.
#include "base/error.h"
#include "kt.h"

#define KT_STRING2(x) #x
#define KT_STRING(x) KT_STRING2(x)

extern "C" {

int32_t kt_abi_version(void) { return KT_ABI_VERSION; }

const char* kt_build_info(void) {
  return "{\"abi\": " KT_STRING(
      KT_ABI_VERSION) ", \"compiler\": \"" __VERSION__
#if defined(__x86_64__)
                      "\", \"isas\": [\"scalar\", \"avx2\", \"avx512\", \"avx512vnni\", \"amx\"]"
#else
                      "\", \"isas\": [\"scalar\"]"
#endif
#if defined(__SANITIZE_ADDRESS__)
                      ", \"sanitizer\": \"address\""
#elif defined(__SANITIZE_THREAD__)
                      ", \"sanitizer\": \"thread\""
#endif
                      "}";
}

const char* kt_last_error(void) { return kt::last_error(); }

}  // extern "C"
