/* A libcuda.so.1 whose launches do nothing: with it, Triton's own CUDA driver runs on a machine without a GPU,
   and the host's part of a launch can be timed. bench/stub_driver.py builds and uses it. */

#include <stdint.h>

typedef int Result;
typedef void *Handle;

#define CONTEXT ((Handle)1)
#define FUNCTION ((Handle)2)

static long launches = 0;

long stub_launches(void) { return launches; }

Result cuLaunchKernelEx(Handle config, Handle function, Handle *arguments, Handle *extra) {
  launches++;
  return 0;
}

Result cuPointerGetAttribute(Handle value, int attribute, uint64_t pointer) {
  *(uint64_t *)value = pointer;
  return 0;
}

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = 232448;
  return 0;
}

Result cuModuleLoadData(Handle *module, const void *image) {
  *module = CONTEXT;
  return 0;
}

Result cuModuleGetFunction(Handle *function, Handle module, const char *name) {
  *function = FUNCTION;
  return 0;
}

Result cuFuncGetAttribute(int *value, int attribute, Handle function) {
  *value = attribute == 0 ? 1024 : 32;
  return 0;
}

Result cuDevicePrimaryCtxRetain(Handle *context, int device) {
  *context = CONTEXT;
  return 0;
}

Result cuCtxGetCurrent(Handle *context) {
  *context = CONTEXT;
  return 0;
}

Result cuCtxGetLimit(uint64_t *value, int limit) {
  *value = 1 << 20;
  return 0;
}

Result cuDeviceGet(int *device, int ordinal) {
  *device = 0;
  return 0;
}

Result cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}

Result cuGetErrorString(int error, const char **text) {
  *text = "an error of the stub";
  return 0;
}

Result cuOccupancyMaxActiveClusters(int *count, Handle function, Handle config) {
  *count = 1;
  return 0;
}

Result cuFuncSetAttribute(Handle function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(Handle function, int config) { return 0; }
Result cuCtxSetCurrent(Handle context) { return 0; }
Result cuCtxSetLimit(int limit, uint64_t value) { return 0; }
Result cuPointerGetAttributes(void) { return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
