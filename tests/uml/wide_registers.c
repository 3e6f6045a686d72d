/* Let user-mode Linux 6.1 run on processors whose register state is larger than it knows (AMX: 11,008 bytes, it knows 2,696).
 *
 * It saves and restores a guest process' vector registers by PTRACE_GETREGSET and PTRACE_SETREGSET of NT_X86_XSTATE. The first may
 * be short, the second must be whole (xstateregs_set() in arch/x86/kernel/fpu/regset.c: EFAULT otherwise), so the guest's very
 * first process dies: "ptrace set fp regs failed, errno = 14". Preloaded into linux.uml, this ptrace completes a short write with
 * what the process has beyond it (AMX tiles, which no process of the guest asks for).
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Not on the stack: this runs on the guest kernel's, which is 16 KiB. One is enough: one thread traces, its signal handlers do not. */
static unsigned char whole[1 << 16] __attribute__((aligned(64)));

long ptrace(enum __ptrace_request request, ...)
{
	va_list rest;
	va_start(rest, request);
	pid_t pid = va_arg(rest, pid_t);
	void *address = va_arg(rest, void *);
	void *data = va_arg(rest, void *);
	va_end(rest);

	if (request == PTRACE_SETREGSET && (long)address == NT_X86_XSTATE) {
		const struct iovec *given = data;
		struct iovec complete = { whole, sizeof(whole) };
		if (syscall(SYS_ptrace, PTRACE_GETREGSET, pid, address, &complete) < 0)
			return -1;
		if (given->iov_len < complete.iov_len) {
			memcpy(whole, given->iov_base, given->iov_len);
			return syscall(SYS_ptrace, request, pid, address, &complete);
		}
	}

	/* glibc's ptrace gives the PEEK requests' word as its result; the system call stores it behind `data`. */
	long word = 0;
	int peeks = request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER;
	long result = syscall(SYS_ptrace, request, pid, address, peeks ? &word : data);
	if (result < 0 || !peeks)
		return result;
	errno = 0;
	return word;
}
