// A CUDA driver without a GPU: it loads what was compiled for the GPU that the environment names, refuses what that GPU
// would refuse, and runs nothing. Only what Triton's launcher asks of a driver is here.
#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MACHINE_CUDA = 190, SHARED_MEMORY_WITHOUT_ASKING = 49152, MOST_THREADS = 1024, MOST_REGISTERS = 65536 };

typedef struct {
  char name[256];
  int shared_memory;
} Function;

static CUcontext current;
// Gets each launch's kernel, and what is wrong with it or NULL.
static void (*report)(const char *kernel, const char *fault);

void stub_report_to(void (*reporter)(const char *, const char *)) { report = reporter; }

static int fact(const char *name) {
  const char *value = getenv(name);
  if (value == NULL) {
    fprintf(stderr, "stub driver: %s is not set\n", name);
    abort();
  }
  return atoi(value);
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return *context = (CUcontext)&current, CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE       ? "invalid argument"
          : error == CUDA_ERROR_NO_BINARY_FOR_GPU ? "no kernel image is available for execution on the device"
          : error == CUDA_ERROR_INVALID_IMAGE     ? "device kernel image is invalid"
                                                  : "not supported by the stub driver";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = fact("STUB_SHARED_MEMORY"); break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = fact("STUB_SHARED_MEMORY") + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = fact("STUB_MULTIPROCESSORS"); break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = MOST_REGISTERS; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 0; break;
  default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const Elf64_Ehdr *header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 || header->e_machine != MACHINE_CUDA)
    return CUDA_ERROR_INVALID_IMAGE;
  // ABI 8, which CUDA 13 writes, moved the architecture.
  int architecture = header->e_flags >> (header->e_ident[EI_ABIVERSION] >= 8 ? 8 : 0) & 0xff;
  int gpu = fact("STUB_CAPABILITY");
  if (architecture / 10 != gpu / 10 || architecture > gpu)
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  return *module = (CUmodule)image, CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Function *made = calloc(1, sizeof(Function));
  snprintf(made->name, sizeof(made->name), "%s", name);
  made->shared_memory = SHARED_MEMORY_WITHOUT_ASKING;
  return *function = (CUfunction)made, CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? MOST_THREADS : 0, CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > fact("STUB_SHARED_MEMORY"))
      return CUDA_ERROR_INVALID_VALUE;
    ((Function *)function)->shared_memory = value;
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *launch, CUfunction handle, void **arguments, void **extra) {
  Function *function = (Function *)handle;
  char fault[512] = "";
  unsigned threads = launch->blockDimX * launch->blockDimY * launch->blockDimZ;
  if (launch->gridDimX - 1 > 0x7ffffffe || launch->gridDimY - 1 > 65534 || launch->gridDimZ - 1 > 65534)
    snprintf(fault, sizeof(fault), "%s: grid (%u, %u, %u)", function->name, launch->gridDimX, launch->gridDimY,
             launch->gridDimZ);
  else if (threads - 1 > MOST_THREADS - 1)
    snprintf(fault, sizeof(fault), "%s: %u threads, at most %d", function->name, threads, MOST_THREADS);
  else if (launch->sharedMemBytes > (unsigned)function->shared_memory)
    snprintf(fault, sizeof(fault), "%s: %u bytes of shared memory, at most %d", function->name, launch->sharedMemBytes,
             function->shared_memory);
  if (report != NULL)
    report(function->name, *fault ? fault : NULL);
  return *fault ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
