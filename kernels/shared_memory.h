// Collectives of the ranks of one node over a segment of shared memory.
//
// The segment: what the ranks tell one another, then two buffers, each with a slot of `capacity` bytes a rank. A call
// is cut into pieces that fit a slot; piece k uses buffer k mod 2.
//
//   One shot:  every rank writes its part to its slot; they meet; every rank sums all parts.
//   Two shots: the elements (or rows) are shared out. Every rank writes the shares of the others to its slot; they
//              meet; every rank sums its own share and writes the result in its place; they meet; every rank copies
//              the shares of the others.
//
// To meet: each rank counts its arrivals in a word of its own, and waits until the words of all others have reached the
// same count. What a rank wrote before it arrived (release) is seen by whoever saw it arrive (acquire).
//
// Why no meeting is needed at the end of a piece. A rank writes to buffer k mod 2 again in piece k + 2. It gets there
// only after it has met the others in piece k + 1, and they arrive there only when they have read all they wanted of
// piece k. So nothing is overwritten before it was read, however far the ranks drift apart; with a single buffer a fast
// rank would write piece k + 1 over what a slow one still reads of piece k. Within two shots, the result of share r
// takes the place of parts that only rank r reads: the slots' share r. (All interleavings of two and three ranks are
// walked through in tests/kernels/test_shared_memory_protocol.py.)
//
// Sums are taken in float32 (integers: modulo 2^n) in the order of the ranks and rounded once, by whoever takes them,
// so all ranks hold the same bits, whichever way was taken.
#pragma once
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "add_norm.h"

namespace shared_memory {

constexpr int kMaxRanks = 32;
constexpr uint64_t kMagic = 0x64766c6d73686d31;  // the layout's version is its last byte
enum Reason : uint64_t { kLate = 1, kEnded = 2, kClosed = 3, kMismatch = 4 };
enum Collective : uint64_t { kAllReduce = 0, kAllGather = 1, kReduceAddNorm = 2, kAttach = 3 };
enum State : uint32_t { kAbsent = 0, kJoining = 1, kAttached = 2, kLeft = 3 };

// From so many bytes of a piece on, two shots are taken. Measured by benchmarks/shared_memory.py --crossover on an EPYC
// of two cores (us for one shot, for two; rows of 1024 bfloat16; four ranks share the cores):
//                           16 KiB      32 KiB      64 KiB     128 KiB     256 KiB
//   2 ranks, all_reduce    2.1  2.0    3.4  2.6    4.9  4.3    7.8  6.7   13.6 11.3
//   2 ranks, norm          7.0  6.2    9.8  8.0   14.4 11.7   23.8 17.9   43.0 32.5
//   4 ranks, all_reduce    8.3  8.7   12.2 10.2   16.6 13.5   25.5 18.3   45.3 30.9
//   4 ranks, norm         18.1 17.7   24.7 20.1   35.9 25.4   58.3 37.8    106 63.6
// In float32 two ranks neither gain nor lose, and two ranks that share a core break even at 64 KiB.
struct Crossover {
    int64_t all_reduce, reduce_add_norm;
};

inline Crossover two_shot_bytes(int world_size) {
    if (world_size == 2) return {64 << 10, 32 << 10};
    return {32 << 10, 32 << 10};
}

struct alignas(128) Arrival {
    uint32_t count;    // futex word
    int32_t core;      // where the rank was when it arrived
    uint64_t call[2];  // what the rank is calling, one for each buffer
};
struct alignas(128) Sleepers {
    uint32_t count;  // ranks that sleep until this rank arrives
};
struct alignas(128) Presence {
    uint32_t state;
    int32_t pid;
    uint64_t started, pid_namespace;  // tell the process from another one that got its number
};
struct alignas(4096) Header {
    uint64_t magic;  // written last
    int32_t world_size;
    int64_t capacity;
    alignas(128) uint64_t failure;  // 0, or why no rank may call any more; see `packed`
    Presence presence[kMaxRanks];
    Arrival arrival[kMaxRanks];
    Sleepers sleepers[kMaxRanks];
};

// reason (4 bits), collective (4), milliseconds waited (24), ranks it is about (32)
inline uint64_t packed(Reason reason, Collective collective, double seconds, uint32_t ranks) {
    uint64_t ms = seconds < 16777.0 ? static_cast<uint64_t>(seconds * 1e3) : 16777000;
    return reason << 60 | collective << 56 | ms << 32 | ranks;
}

template <typename T>
T load(const T* word) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

inline double seconds_now() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

inline void futex_wait(uint32_t* word, uint32_t seen, double seconds) {
    timespec most;
    most.tv_sec = static_cast<time_t>(seconds);
    most.tv_nsec = static_cast<long>((seconds - static_cast<double>(most.tv_sec)) * 1e9);
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &most, nullptr, 0);
}

inline void futex_wake_all(uint32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

// A process's state letter and start time in /proc; false where that cannot be read.
inline bool read_process(const char* path, char* state, uint64_t* started) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return false;
    char text[1024];
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0) return false;
    text[length] = 0;
    // "pid (name) state ...": the name may hold anything, so count from the last parenthesis.
    const char* rest = strrchr(text, ')');
    unsigned long long start = 0;
    const char* form = " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu";
    if (!rest || sscanf(rest + 1, form, state, &start) != 2) return false;
    *started = start;
    return true;
}

inline uint64_t pid_namespace() {
    struct stat found;
    return stat("/proc/self/ns/pid", &found) == 0 ? found.st_ino : 0;
}

inline bool has_ended(const Presence& rank, uint64_t own_namespace) {
    if (own_namespace == 0 || rank.pid_namespace != own_namespace) return false;  // its number means nothing here
    char path[40], state = 0;
    uint64_t started = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", rank.pid);
    if (read_process(path, &state, &started)) {
        return state == 'Z' || state == 'X' || (rank.started && started != rank.started);
    }
    return kill(rank.pid, 0) != 0 && errno == ESRCH;
}

template <typename T>
constexpr bool kIsWhole = std::is_integral<T>::value;

// out = parts[0] + parts[1] + ..., elements `from` to `to`; out may be one of the parts.
template <typename T>
void sum_serial(const T* const* parts, int count, T* out, int64_t from, int64_t to) {
    int64_t i = from;
    if constexpr (kIsWhole<T>) {
        for (; i < to; i++) {
            T total = parts[0][i];
            for (int r = 1; r < count; r++) total += parts[r][i];
            out[i] = total;
        }
    } else {
        for (; i + 16 <= to; i += 16) {
            Vector total = load16(parts[0] + i) + load16(parts[1] + i);
            for (int r = 2; r < count; r++) total += load16(parts[r] + i);
            store16(out + i, total);
        }
        for (; i < to; i++) {
            float total = widen(parts[0][i]) + widen(parts[1][i]);
            for (int r = 2; r < count; r++) total += widen(parts[r][i]);
            out[i] = narrow<T>(total);
        }
    }
}

template <typename T>
void sum(const T* const* parts, int count, T* out, int64_t from, int64_t to) {
    if (to - from < kParallelElements) return sum_serial(parts, count, out, from, to);
    constexpr int64_t kStride = 4096;
#pragma omp parallel for schedule(static)
    for (int64_t at = from; at < to; at += kStride) {
        sum_serial(parts, count, out, at, at + kStride < to ? at + kStride : to);
    }
}

// A rank's end of a segment. One thread at a time may call it.
class Group {
public:
    // `base` has `bytes_needed` bytes and was formatted; the ranks' presence is the business of attach.
    Group(char* base, int rank, double timeout)
        : base_(base),
          header_((Header*)base),
          rank_(rank),
          world_size_(header_->world_size),
          capacity_(header_->capacity),
          timeout_(timeout),
          crossover_(two_shot_bytes(world_size_)),
          namespace_(pid_namespace()) {
        cpu_set_t cores;
        bool roomy = sched_getaffinity(0, sizeof cores, &cores) == 0 && CPU_COUNT(&cores) >= world_size_;
        // With a core for each rank the others are about to arrive. Without, they may be waiting for this very core.
        spins_ = roomy ? 200 : 20;
    }

    static size_t bytes_needed(int world_size, int64_t capacity) {
        return sizeof(Header) + 2 * static_cast<size_t>(world_size) * static_cast<size_t>(capacity);
    }

    // Makes a segment of zeros one of a group.
    static void format(char* base, int world_size, int64_t capacity) {
        Header* header = (Header*)base;
        header->world_size = world_size;
        header->capacity = capacity;
        __atomic_store_n(&header->magic, kMagic, __ATOMIC_RELEASE);
    }

    // Takes the rank's place; false where it is taken. `announce` makes it known.
    bool claim() {
        Presence& own = header_->presence[rank_];
        uint32_t absent = kAbsent;
        if (!__atomic_compare_exchange_n(&own.state, &absent, kJoining, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
            return false;
        }
        char state;
        own.pid = getpid();
        own.pid_namespace = namespace_;
        if (!read_process("/proc/self/stat", &state, &own.started)) own.started = 0;
        __atomic_store_n(&own.state, kAttached, __ATOMIC_RELEASE);
        return true;
    }

    // Ranks that have not attached.
    uint32_t absent() const {
        uint32_t ranks = 0;
        for (int r = 0; r < world_size_; r++) {
            if (load(&header_->presence[r].state) < kAttached) ranks |= 1u << r;
        }
        return ranks;
    }

    // Tells those who have attached, or will, that the group will never be whole.
    void give_up(uint32_t missing) {
        collective_ = kAttach;
        fail(kLate, timeout_, missing);
        leave();
    }

    void leave() {
        __atomic_store_n(&header_->presence[rank_].state, kLeft, __ATOMIC_RELEASE);
        futex_wake_all(&header_->arrival[rank_].count);
    }

    uint64_t failure() const { return load(&header_->failure); }
    char* base() const { return base_; }
    size_t bytes() const { return bytes_needed(world_size_, capacity_); }
    void set_crossover(Crossover value) { crossover_ = value; }

    // In place. Each of the following returns false where the group has failed; `failure` tells why.
    template <typename T>
    bool all_reduce(T* data, int64_t size) {
        return begin(kAllReduce, sizeof(T), size) && reduce_pieces(data, size);
    }

    // out: [world_size, bytes]
    bool all_gather(const char* data, char* out, int64_t bytes) {
        if (!begin(kAllGather, 1, bytes)) return false;
        for (int64_t at = 0; at < bytes; at += capacity_) {
            size_t size = static_cast<size_t>(bytes - at < capacity_ ? bytes - at : capacity_);
            next_buffer();
            std::memcpy(slot<char>(rank_), data + at, size);
            if (!meet() || !agreed()) return false;
            for (int r = 0; r < world_size_; r++) {
                std::memcpy(out + r * bytes + at, r == rank_ ? data + at : slot<char>(r), size);
            }
        }
        return true;
    }

    // partial becomes residual + its sum over the ranks; see reduce_add_norm.py.
    template <typename T>
    bool reduce_add_norm(T* partial, const T* residual, const T* weight, T* normed, int64_t rows, int64_t size,
                         float eps) {
        if (!begin(kReduceAddNorm, sizeof(T), rows * size)) return false;
        if (rows * size == 0) return true;
        int64_t most = capacity_ / static_cast<int64_t>(sizeof(T)) / size;
        if (most == 0) {  // not even a row fits
            if (!reduce_pieces(partial, rows * size)) return false;
            norm_rows<T>(nullptr, partial, residual, weight, normed, 0, rows, size, eps);
            return true;
        }
        for (int64_t row = 0; row < rows; row += most) {
            int64_t at = row * size, count = rows - row < most ? rows - row : most;
            const T* old = residual ? residual + at : nullptr;
            if (!reduce_norm_piece(partial + at, old, weight, normed + at, count, size, eps)) return false;
        }
        return true;
    }

private:
    bool begin(Collective collective, size_t element, int64_t size) {
        collective_ = collective;
        call_ = collective << 60 | static_cast<uint64_t>(element) << 52 | static_cast<uint64_t>(size);
        return failure() == 0;
    }

    void next_buffer() {
        buffer_ ^= 1;
        header_->arrival[rank_].call[buffer_] = call_;
    }

    template <typename T>
    T* slot(int rank) const {
        size_t before = static_cast<size_t>(buffer_ * world_size_ + rank);
        return (T*)(base_ + sizeof(Header) + before * static_cast<size_t>(capacity_));
    }

    // Where share `rank` of `size` things begins; `unit` of them are not divided.
    int64_t share(int rank, int64_t size, int64_t unit) const {
        int64_t begin = (size + unit - 1) / unit * rank / world_size_ * unit;
        return begin < size ? begin : size;
    }

    template <typename T>
    bool reduce_pieces(T* data, int64_t size) {
        int64_t most = capacity_ / static_cast<int64_t>(sizeof(T));
        for (int64_t at = 0; at < size; at += most) {
            if (!reduce_piece(data + at, size - at < most ? size - at : most)) return false;
        }
        return true;
    }

    // The parts of the piece in this buffer, in rank order. A rank reads its own where it was.
    template <typename T>
    void find_parts(const T* own, const T** parts) const {
        for (int r = 0; r < world_size_; r++) parts[r] = r == rank_ ? own : slot<T>(r);
    }

    template <typename T>
    bool reduce_piece(T* data, int64_t size) {
        const T* parts[kMaxRanks];
        next_buffer();
        find_parts<T>(data, parts);
        if (size * static_cast<int64_t>(sizeof(T)) < crossover_.all_reduce) {
            copy(slot<T>(rank_), data, 0, size);
            if (!meet() || !agreed()) return false;
            sum(parts, world_size_, data, 0, size);
            return true;
        }
        // Shares begin at cache lines, so that no two ranks write to one.
        int64_t unit = 64 / static_cast<int64_t>(sizeof(T));
        int64_t from = share(rank_, size, unit), to = share(rank_ + 1, size, unit);
        copy(slot<T>(rank_), data, 0, from);
        copy(slot<T>(rank_), data, to, size);
        if (!meet() || !agreed()) return false;
        sum(parts, world_size_, data, from, to);
        copy(slot<T>(rank_), data, from, to);
        if (!meet()) return false;
        for (int r = 0; r < world_size_; r++) {
            if (r != rank_) copy(data, slot<T>(r), share(r, size, unit), share(r + 1, size, unit));
        }
        return true;
    }

    template <typename T>
    bool reduce_norm_piece(T* partial, const T* residual, const T* weight, T* normed, int64_t rows, int64_t size,
                           float eps) {
        const T* parts[kMaxRanks];
        int64_t all = rows * size;
        next_buffer();
        find_parts<T>(partial, parts);
        if (all * static_cast<int64_t>(sizeof(T)) < crossover_.reduce_add_norm) {
            copy(slot<T>(rank_), partial, 0, all);
            if (!meet() || !agreed()) return false;
            norm_rows(parts, partial, residual, weight, normed, 0, rows, size, eps);
            return true;
        }
        // The norm of share r takes the place of the part that the next rank had for it.
        int64_t first = share(rank_, rows, 1), last = share(rank_ + 1, rows, 1);
        copy(slot<T>(rank_), partial, 0, first * size);
        copy(slot<T>(rank_), partial, last * size, all);
        if (!meet() || !agreed()) return false;
        norm_rows(parts, partial, residual, weight, normed, first, last, size, eps);
        copy(slot<T>(rank_), partial, first * size, last * size);
        copy(slot<T>((rank_ + 1) % world_size_), normed, first * size, last * size);
        if (!meet()) return false;
        for (int r = 0; r < world_size_; r++) {
            if (r == rank_) continue;
            int64_t from = share(r, rows, 1) * size, to = share(r + 1, rows, 1) * size;
            copy(partial, slot<T>(r), from, to);
            copy(normed, slot<T>((r + 1) % world_size_), from, to);
        }
        return true;
    }

    template <typename T>
    static void copy(T* out, const T* in, int64_t from, int64_t to) {
        if (from < to) std::memcpy(out + from, in + from, static_cast<size_t>(to - from) * sizeof(T));
    }

    // Rows `first` to `last`: the sum of the parts (unless there are none), the residual and the norm.
    template <typename T>
    void norm_rows(const T* const* parts, T* partial, const T* residual, const T* weight, T* normed, int64_t first,
                   int64_t last, int64_t size, float eps) const {
        auto one = [=](int64_t row) {
            int64_t at = row * size;
            if (parts) sum_serial(parts, world_size_, partial, at, at + size);
            add_norm_row<T>(partial + at, residual ? residual + at : nullptr, weight, normed + at, size, eps);
        };
        if ((last - first) * size < kParallelElements) {
            for (int64_t row = first; row < last; row++) one(row);
            return;
        }
#pragma omp parallel for schedule(static)
        for (int64_t row = first; row < last; row++) one(row);
    }

    // Arrives, and returns when all have, or false.
    bool meet() {
        uint32_t target = ++arrivals_;
        __atomic_store_n(&header_->arrival[rank_].core, sched_getcpu(), __ATOMIC_RELAXED);
        // In one total order with the sleeper's count, so either the sleeper sees the arrival or it is woken.
        __atomic_store_n(&header_->arrival[rank_].count, target, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&header_->sleepers[rank_].count, __ATOMIC_SEQ_CST)) {
            futex_wake_all(&header_->arrival[rank_].count);
        }
        double began = 0.0, next_look = kLookSeconds;
        for (int step = 1; step < world_size_; step++) {
            if (!wait_for((rank_ + step) % world_size_, target, &began, &next_look)) return false;
        }
        return true;
    }

    // Whether all ranks call the same: false, and the group has failed, where they do not.
    bool agreed() {
        uint32_t others = 0;
        for (int r = 0; r < world_size_; r++) {
            if (header_->arrival[r].call[buffer_] != call_) others |= 1u << r;
        }
        if (others) fail(kMismatch, 0.0, others);
        return others == 0;
    }

    // Counts wrap around, and no two ranks are ever more than one arrival apart.
    bool has_arrived(int rank, uint32_t target) const {
        return static_cast<int32_t>(load(&header_->arrival[rank].count) - target) >= 0;
    }

    bool wait_for(int rank, uint32_t target, double* began, double* next_look) {
        if (has_arrived(rank, target)) return true;
        // To spin on the other's own core would only keep it from arriving.
        int spins = __atomic_load_n(&header_->arrival[rank].core, __ATOMIC_RELAXED) == sched_getcpu() ? 0 : spins_;
        for (int spin = 0; spin < spins; spin++) {
            pause();
            if (has_arrived(rank, target)) return true;
        }
        uint32_t* word = &header_->arrival[rank].count;
        uint32_t* sleepers = &header_->sleepers[rank].count;
        for (;;) {
            uint32_t seen = load(word);
            if (static_cast<int32_t>(seen - target) >= 0) return true;
            if (failure()) return false;
            double now = seconds_now();
            if (*began == 0.0) *began = now;
            double waited = now - *began;
            if (waited >= *next_look || waited >= timeout_) {
                *next_look = waited + kLookSeconds;
                if (look_for_lost(target, waited)) return false;
            } else if (waited < kYieldSeconds) {
                sched_yield();
            } else {
                double most = (*next_look < timeout_ ? *next_look : timeout_) - waited;
                __atomic_fetch_add(sleepers, 1, __ATOMIC_SEQ_CST);
                futex_wait(word, seen, most < kNapSeconds ? most : kNapSeconds);
                __atomic_fetch_sub(sleepers, 1, __ATOMIC_SEQ_CST);
            }
        }
    }

    // Whether a rank that has not arrived never will, or has had its time; then the group has failed.
    bool look_for_lost(uint32_t target, double waited) {
        uint32_t late = 0, ended = 0, left = 0;
        for (int r = 0; r < world_size_; r++) {
            if (has_arrived(r, target)) continue;
            const Presence& other = header_->presence[r];
            bool gone = load(&other.state) == kLeft, dead = !gone && has_ended(other, namespace_);
            if (has_arrived(r, target)) continue;  // it did so before it went
            late |= 1u << r;
            if (gone) left |= 1u << r;
            if (dead) ended |= 1u << r;
        }
        if (ended) {
            fail(kEnded, waited, ended);
        } else if (left) {
            fail(kClosed, waited, left);
        } else if (late && waited >= timeout_) {
            fail(kLate, waited, late);
        }
        return failure() != 0;
    }

    // The first reason stands. Sleepers are woken; one that was just about to sleep finds out after its nap.
    void fail(Reason reason, double seconds, uint32_t ranks) {
        uint64_t none = 0;
        __atomic_compare_exchange_n(&header_->failure, &none, packed(reason, collective_, seconds, ranks), false,
                                    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        for (int r = 0; r < world_size_; r++) futex_wake_all(&header_->arrival[r].count);
    }

    // A rank first spins (some us), then offers its core to others again and again, then sleeps: waking a core that has
    // gone idle takes longer than most waits. Every kLookSeconds it looks for ranks that have ended.
    static constexpr double kYieldSeconds = 1e-3, kLookSeconds = 0.2, kNapSeconds = 0.05;

    char* base_;
    Header* header_;
    int rank_, world_size_;
    int64_t capacity_;
    double timeout_;
    Crossover crossover_;
    uint64_t namespace_;
    int spins_;
    Collective collective_ = kAllReduce;
    uint64_t call_ = 0;
    uint32_t arrivals_ = 0;
    int buffer_ = 0;
};

}  // namespace shared_memory
