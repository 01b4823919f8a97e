/* A stand-in for the NVIDIA driver's library, so that the real gpustat and pynvml run end to end without a GPU.
 *
 *     gcc -shared -fPIC -o libnvidia-ml.so.1 fake_nvml.c
 *
 * It has the functions that gpustat and glmlab call. What it reports is read at every call from the text file that
 * FAKE_NVML_STATE names, one line a device; sizes are in MiB:
 *
 *     gpu TOTAL USED [PID=MIB ...]      a whole GPU; PID may be "self" (the calling process), MIB may be "withheld"
 *     mig TOTAL USED [PID=MIB ...]      a MIG slice of the GPU above it
 *     lost                              the GPU above has fallen off the bus
 *
 * Without the file the driver is gone: starting fails, and so does every query.
 * GPU i has the UUID GPU-00000000-0000-0000-0000-00000000000i, slice j of it MIG-00000000-0000-0000-0001-00000000000ij.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
};
enum { MAX_GPUS = 4, MAX_SLICES = 4, MAX_PROCESSES = 8, PLACES = MAX_SLICES };

typedef unsigned long long u64;
typedef struct { unsigned int pid; u64 bytes; } Process;
typedef struct {
    bool is_slice, lost;
    int gpu, slice; /* place in the tables below */
    u64 total, used;
    int n_processes;
    Process processes[MAX_PROCESSES];
} Device;

static const u64 WITHHELD = ~0ULL; /* NVML_VALUE_NOT_AVAILABLE */
static Device gpus[MAX_GPUS], slices[MAX_GPUS][MAX_SLICES];
static int n_gpus, n_slices[MAX_GPUS];

/* ------------------------------------------------------------------------------------------ the state file */

static u64 bytes_of_mib(const char *text) { return strtoull(text, NULL, 10) * 1024 * 1024; }

static void read_device(Device *device, int gpu, int slice) {
    *device = (Device){.is_slice = slice >= 0, .gpu = gpu, .slice = slice};
    const char *total = strtok(NULL, " \n"), *used = strtok(NULL, " \n");
    device->total = bytes_of_mib(total ? total : "0");
    device->used = bytes_of_mib(used ? used : "0");
    for (char *word; (word = strtok(NULL, " \n")) && device->n_processes < MAX_PROCESSES;) {
        char *mib = strchr(word, '=');
        if (!mib) continue;
        *mib++ = '\0';
        Process *process = &device->processes[device->n_processes++];
        process->pid = strcmp(word, "self") ? (unsigned int)atoi(word) : (unsigned int)getpid();
        process->bytes = strcmp(mib, "withheld") ? bytes_of_mib(mib) : WITHHELD;
    }
}

/* Returns whether there is a driver. */
static bool read_state(void) {
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return false;
    n_gpus = 0;
    memset(n_slices, 0, sizeof n_slices);
    char line[512];
    while (fgets(line, sizeof line, file)) {
        const char *what = strtok(line, " \n");
        if (!what) continue;
        int last = n_gpus - 1;
        if (!strcmp(what, "gpu") && n_gpus < MAX_GPUS) {
            read_device(&gpus[n_gpus], n_gpus, -1);
            n_gpus++;
        } else if (!strcmp(what, "mig") && last >= 0 && n_slices[last] < MAX_SLICES) {
            read_device(&slices[last][n_slices[last]], last, n_slices[last]);
            n_slices[last]++;
        } else if (!strcmp(what, "lost") && last >= 0) {
            gpus[last].lost = true;
        }
    }
    fclose(file);
    return true;
}

static int check(const Device *device) {
    if (!read_state()) return GPU_IS_LOST;
    return gpus[device->gpu].lost ? GPU_IS_LOST : SUCCESS;
}

static void write_uuid(const Device *device, char *buffer, unsigned int length) {
    if (device->is_slice)
        snprintf(buffer, length, "MIG-00000000-0000-0000-0001-0000000000%d%d", device->gpu, device->slice);
    else
        snprintf(buffer, length, "GPU-00000000-0000-0000-0000-00000000000%d", device->gpu);
}

/* ------------------------------------------------------------------------------------------------- library */

int nvmlInitWithFlags(unsigned int flags) { (void)flags; return read_state() ? SUCCESS : DRIVER_NOT_LOADED; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int result) {
    switch (result) {
    case SUCCESS: return "Success";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *buffer, unsigned int length) {
    snprintf(buffer, length, "999.00.fake");
    return SUCCESS;
}

/* ------------------------------------------------------------------------------------------------- devices */

int nvmlDeviceGetCount_v2(unsigned int *count) {
    if (!read_state()) return DRIVER_NOT_LOADED;
    *count = (unsigned int)n_gpus;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device) {
    if (!read_state()) return DRIVER_NOT_LOADED;
    if ((int)index >= n_gpus) return INVALID_ARGUMENT;
    *device = &gpus[index];
    return check(*device);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    if (!read_state()) return DRIVER_NOT_LOADED;
    char known[96];
    for (int gpu = 0; gpu < n_gpus; gpu++) {
        for (int slice = -1; slice < n_slices[gpu]; slice++) {
            Device *candidate = slice < 0 ? &gpus[gpu] : &slices[gpu][slice];
            write_uuid(candidate, known, sizeof known);
            if (!strcmp(uuid, known)) { *device = candidate; return SUCCESS; }
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetIndex(Device *device, unsigned int *index) {
    *index = (unsigned int)(device->is_slice ? device->slice : device->gpu);
    return check(device);
}

int nvmlDeviceGetName(Device *device, char *buffer, unsigned int length) {
    snprintf(buffer, length, device->is_slice ? "Fake GPU MIG 1g.10gb" : "Fake GPU");
    return check(device);
}

int nvmlDeviceGetUUID(Device *device, char *buffer, unsigned int length) {
    write_uuid(device, buffer, length);
    return check(device);
}

int nvmlDeviceGetMigMode(Device *device, unsigned int *current, unsigned int *pending) {
    int result = check(device);
    *current = *pending = n_slices[device->gpu] > 0;
    return result;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned int *count) { *count = PLACES; return check(device); }

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned int place, Device **slice) {
    int result = check(device);
    if (result == SUCCESS && (int)place >= n_slices[device->gpu]) return NOT_FOUND;
    *slice = &slices[device->gpu][place];
    return result;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *slice, Device **whole) {
    *whole = &gpus[slice->gpu];
    return check(slice);
}

/* -------------------------------------------------------------------------------------------------- memory */

typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned int version; u64 total, reserved, free, used; } MemoryV2;
typedef struct { unsigned int pid; u64 used; unsigned int gpu_instance, compute_instance; } ProcessInfo;

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    int result = check(device);
    *memory = (Memory){device->total, device->total - device->used, device->used};
    return result;
}

int nvmlDeviceGetMemoryInfo_v2(Device *device, MemoryV2 *memory) {
    int result = check(device);
    *memory = (MemoryV2){memory->version, device->total, 0, device->total - device->used, device->used};
    return result;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned int *count, ProcessInfo *infos) {
    int result = check(device);
    if (result != SUCCESS) return result;
    bool fits = (int)*count >= device->n_processes;
    *count = (unsigned int)device->n_processes;
    if (!fits) return INSUFFICIENT_SIZE;
    for (int i = 0; i < device->n_processes; i++)
        infos[i] = (ProcessInfo){device->processes[i].pid, device->processes[i].bytes, ~0U, ~0U};
    return SUCCESS;
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(Device *device, unsigned int *count, ProcessInfo *infos) {
    (void)infos;
    *count = 0;
    return device->is_slice ? NOT_SUPPORTED : check(device);
}

/* -------------------------------------------------------------------------------------------------- clocks */

int nvmlDeviceGetTemperature(Device *device, unsigned int sensor, unsigned int *degrees) {
    (void)sensor;
    *degrees = 40;
    return check(device);
}
int nvmlDeviceGetClockInfo(Device *device, unsigned int kind, unsigned int *mhz) {
    *mhz = kind == 1 ? 1500 : 0; /* NVML_CLOCK_SM */
    return device->is_slice ? NOT_SUPPORTED : check(device);
}
