/*
 * Preloaded into a User-Mode Linux that keeps less of a process's registers than this processor has: before Linux 6.13 it
 * keeps 2696 octets, with AMX there are 11008, and the kernel beneath takes back all or none. What it did not keep
 * (AMX's tiles) is given back in its initial state, in which a new process has it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define NT_X86_XSTATE 0x202
/* XSTATE_BV, after the 512 octets of FXSAVE, and the components that lie within 2696 octets: x87 to AVX-512, PKRU. */
#define XSTATE_BV 512
#define KEPT_COMPONENTS 0x2e7UL

static long as_it_is(long request, long pid, void *address, void *data)
{
	return syscall(SYS_ptrace, request, pid, address, data);
}

static long give_back(long pid, void *address, const struct iovec *kept)
{
	/* Not on the stack, which is a kernel's and small; there is one thread. */
	static _Alignas(64) unsigned char all[32768];
	struct iovec registers = { all, sizeof all };
	unsigned long components;

	if (as_it_is(PTRACE_GETREGSET, pid, address, &registers) < 0)
		return -1;
	if (kept->iov_len >= registers.iov_len || kept->iov_len < XSTATE_BV + sizeof components)
		return as_it_is(PTRACE_SETREGSET, pid, address, (void *)kept);
	memcpy(all, kept->iov_base, kept->iov_len);
	memcpy(&components, all + XSTATE_BV, sizeof components);
	components &= KEPT_COMPONENTS;
	memcpy(all + XSTATE_BV, &components, sizeof components);
	return as_it_is(PTRACE_SETREGSET, pid, address, &registers);
}

long ptrace(enum __ptrace_request request, ...)
{
	va_list arguments;
	long pid, word, result;
	void *address, *data;

	va_start(arguments, request);
	pid = va_arg(arguments, int);
	address = va_arg(arguments, void *);
	data = va_arg(arguments, void *);
	va_end(arguments);
	if (request == PTRACE_SETREGSET && (unsigned long)address == NT_X86_XSTATE)
		return give_back(pid, address, data);
	if (request != PTRACE_PEEKTEXT && request != PTRACE_PEEKDATA && request != PTRACE_PEEKUSER)
		return as_it_is(request, pid, address, data);
	/* As ptrace(2) says of the C library's: the word is the result. */
	result = as_it_is(request, pid, address, &word);
	if (result < 0)
		return result;
	errno = 0;
	return word;
}
