// Faults on guard pages: noted, then let through, so that the launch goes on and its test fails with names.
//
// The handler makes the page that was hit readable and writable and returns: the instruction runs again and succeeds.
// A fault anywhere else is written to the report together with what was launched, and ends the process as before.

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

constexpr int kMaxRanges = 256, kMaxHits = 64;
constexpr uintptr_t kPage = 4096;

struct Range {
  uintptr_t first, end;
};

Range ranges[kMaxRanges];
Range hits[kMaxHits];  // Address, and 1 for a write, 0 for a read, 2 where the processor does not say.
int num_ranges = 0, num_hits = 0, report = 2;
char launch_text[4096] = "";
struct sigaction before;

uintptr_t kind_of(void* context) {
#if defined(__x86_64__)
  return static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] >> 1 & 1;
#else
  (void)context;
  return 2;
#endif
}

void say(uintptr_t address) {
  char text[5000];
  const int length = snprintf(text, sizeof(text), "%s: address 0x%llx, far outside of every argument\n", launch_text,
                              static_cast<unsigned long long>(address));
  if (write(report, text, static_cast<size_t>(length)) < 0) return;
}

void handle(int, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (int i = 0; i < num_ranges; ++i) {
    if (address < ranges[i].first || address >= ranges[i].end) continue;
    if (num_hits < kMaxHits) hits[num_hits++] = {address, kind_of(context)};
    mprotect(reinterpret_cast<void*>(address & ~(kPage - 1)), kPage, PROT_READ | PROT_WRITE);
    return;
  }
  if (launch_text[0]) say(address);
  sigaction(SIGSEGV, &before, nullptr);
}

}  // namespace

extern "C" {

int guard_install(int report_file) {
  struct sigaction action;
  memset(&action, 0, sizeof(action));
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  report = report_file;
  return sigaction(SIGSEGV, &action, &before);
}

void guard_remove() { sigaction(SIGSEGV, &before, nullptr); }

void guard_begin(const char* text) {
  num_ranges = num_hits = 0;
  snprintf(launch_text, sizeof(launch_text), "%s", text);
}

int guard_watch(uintptr_t first, uintptr_t end) {
  if (num_ranges == kMaxRanges) return -1;
  ranges[num_ranges++] = {first, end};
  return 0;
}

// Addresses and kinds of the faults since guard_begin, at most kMaxHits pairs.
int guard_end(uintptr_t* found) {
  memcpy(found, hits, sizeof(Range) * static_cast<size_t>(num_hits));
  num_ranges = 0;
  launch_text[0] = 0;
  return num_hits;
}
}
