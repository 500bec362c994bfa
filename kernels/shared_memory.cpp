// The segment's way into and out of the process, and what shared_memory.py calls.
#include "shared_memory.h"

using namespace shared_memory;

namespace {

enum Outcome : int32_t { kOk = 0, kTimedOut = 1, kSystemError = 2, kTaken = 3, kOther = 4, kFailed = 5, kNoGroup = 6 };

void nap() {
    timespec briefly = {0, 500000};
    nanosleep(&briefly, nullptr);
}

char* map(int file, size_t bytes) {
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
    return base == MAP_FAILED ? nullptr : (char*)base;
}

// Rank 0 makes the segment, all of it reserved: a full /dev/shm is an error here, not a SIGBUS later.
Outcome make(const char* name, int world_size, int64_t capacity, char** base, int64_t* detail) {
    size_t bytes = Group::bytes_needed(world_size, capacity);
    int file = shm_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0) {
        *detail = errno;
        return errno == EEXIST ? kTaken : kSystemError;
    }
    int error = posix_fallocate(file, 0, static_cast<off_t>(bytes));
    if (error == 0 && !(*base = map(file, bytes))) error = errno;
    close(file);
    if (error) {
        shm_unlink(name);
        *detail = error;
        return kSystemError;
    }
    Group::format(*base, world_size, capacity);
    return kOk;
}

// The others wait until it is there. detail: an error's number, or the world size or the capacity that differs.
Outcome find(const char* name, int world_size, int64_t capacity, double deadline, char** base, int64_t* detail) {
    for (;; nap()) {
        int file = shm_open(name, O_RDWR | O_CLOEXEC, 0);
        if (file < 0 && errno != ENOENT) {
            *detail = errno;
            return kSystemError;
        }
        struct stat found = {};
        if (file >= 0 && fstat(file, &found) == 0 && found.st_size >= static_cast<off_t>(sizeof(Header))) {
            size_t bytes = static_cast<size_t>(found.st_size);
            char* mapped = map(file, bytes);
            int error = errno;
            close(file);
            if (!mapped) {
                *detail = error;
                return kSystemError;
            }
            Header* header = (Header*)mapped;
            while (load(&header->magic) != kMagic && seconds_now() < deadline) nap();
            bool ready = load(&header->magic) == kMagic;
            if (ready && bytes == Group::bytes_needed(world_size, capacity) && header->world_size == world_size) {
                *base = mapped;
                return kOk;
            }
            *detail = header->world_size != world_size ? header->world_size : header->capacity;
            munmap(mapped, bytes);
            return ready ? kOther : kTimedOut;
        }
        if (file >= 0) close(file);
        if (seconds_now() >= deadline) return kTimedOut;
    }
}

// Of a failure: the milliseconds waited and, in the low half, the ranks.
int64_t absence(uint64_t failure) { return static_cast<int64_t>(failure & 0xffffffffffffff); }

template <typename Call>
int32_t called(void* group, Call call) {
    if (!group) return kNoGroup;
    return call(*(Group*)group) ? kOk : kFailed;
}

}  // namespace

// detail: an absence, an error's number, or what differs in the segment.
extern "C" int32_t shared_memory_attach(const char* name, int32_t rank, int32_t world_size, int64_t capacity,
                                        double timeout, void** group, int64_t* detail) {
    double deadline = seconds_now() + timeout;
    char* base = nullptr;
    Outcome outcome = rank == 0 ? make(name, world_size, capacity, &base, detail)
                                : find(name, world_size, capacity, deadline, &base, detail);
    if (outcome != kOk) {
        if (outcome == kTimedOut) *detail = absence(packed(kLate, kAttach, timeout, 1));  // rank 0 has not made it
        return outcome;
    }
    Group* made = new Group(base, rank, timeout);
    if (!made->claim()) {
        outcome = kTaken;
    } else {
        uint32_t missing;
        while ((missing = made->absent()) && !made->failure() && seconds_now() < deadline) nap();
        if (missing) made->give_up(missing);
        // This early a failure is a rank's giving up, here or elsewhere.
        if ((*detail = absence(made->failure()))) outcome = kTimedOut;
        // Whoever sees all attached takes the name away: no rank's end after this leaves anything behind. And one that
        // gives up takes it away too, since the group will never be whole.
        shm_unlink(name);
    }
    if (outcome == kOk) {
        *group = made;
        return kOk;
    }
    munmap(made->base(), made->bytes());
    delete made;
    return outcome;
}

extern "C" void shared_memory_close(void* group) {
    if (!group) return;
    Group* open = (Group*)group;
    open->leave();
    munmap(open->base(), open->bytes());
    delete open;
}

extern "C" uint64_t shared_memory_failure(void* group) { return ((Group*)group)->failure(); }

// From how many bytes of a piece on two shots are taken; what is measured with.
extern "C" void shared_memory_set_crossover(void* group, int64_t all_reduce, int64_t reduce_add_norm) {
    ((Group*)group)->set_crossover({all_reduce, reduce_add_norm});
}

extern "C" int32_t shared_memory_all_gather(void* group, const void* data, void* out, int64_t bytes) {
    return called(group, [=](Group& open) { return open.all_gather((const char*)data, (char*)out, bytes); });
}

#define EXPORT_ALL_REDUCE(name, T)                                                       \
    extern "C" int32_t name(void* group, void* data, int64_t size) {                     \
        return called(group, [=](Group& open) { return open.all_reduce((T*)data, size); }); \
    }
EXPORT_ALL_REDUCE(shared_memory_all_reduce_float32, float)
EXPORT_ALL_REDUCE(shared_memory_all_reduce_bfloat16, BFloat16)
EXPORT_ALL_REDUCE(shared_memory_all_reduce_float16, _Float16)
EXPORT_ALL_REDUCE(shared_memory_all_reduce_int32, uint32_t)
EXPORT_ALL_REDUCE(shared_memory_all_reduce_int64, uint64_t)

#define EXPORT_REDUCE_ADD_NORM(name, T)                                                                           \
    extern "C" int32_t name(void* group, void* partial, const void* residual, const void* weight, void* normed,    \
                            int64_t rows, int64_t size, float eps) {                                               \
        return called(group, [=](Group& open) {                                                                    \
            return open.reduce_add_norm((T*)partial, (const T*)residual, (const T*)weight, (T*)normed, rows, size, \
                                        eps);                                                                      \
        });                                                                                                        \
    }
EXPORT_REDUCE_ADD_NORM(shared_memory_reduce_add_norm_float32, float)
EXPORT_REDUCE_ADD_NORM(shared_memory_reduce_add_norm_bfloat16, BFloat16)
EXPORT_REDUCE_ADD_NORM(shared_memory_reduce_add_norm_float16, _Float16)
