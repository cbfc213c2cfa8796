//! Shuts the way around the functions that we replace which the system can shut: io_uring connects and sends without them.

use std::ffi::{c_int, c_long};

use latch::exec::ENVIRONMENT_UNCONFINED;
use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter, sock_fprog};

use crate::policy::Refusal;

/// Makes io_uring_setup(2) fail with ENOSYS, for this program and all that it starts.
pub(crate) fn confine() -> Result<(), Refusal> {
    if std::env::var_os(ENVIRONMENT_UNCONFINED).is_some() || !has_io_uring() {
        return Ok(());
    }
    let operation =
        |code: u32, value: u32, no: u8| sock_filter { code: u16::try_from(code).unwrap_or(0), jt: 0, jf: no, k: value };
    // The number is the same on every architecture, and is the first field of what the filter sees. Programs of 32 bits
    // cannot load this library.
    let number = u32::try_from(libc::SYS_io_uring_setup).unwrap_or(u32::MAX);
    let refuse = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::ENOSYS).unwrap_or(0);
    let mut filter = [
        operation(BPF_LD | BPF_W | BPF_ABS, 0, 0),
        operation(BPF_JMP | BPF_JEQ | BPF_K, number, 1),
        operation(BPF_RET | BPF_K, refuse, 0),
        operation(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: the program has four instructions, all of which live here; the system copies them.
    let outcome = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if outcome == 0 && !has_io_uring() {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    let message = format!("io_uring cannot be shut: {error}; latchkey exec --unconfined leaves it open");
    Err(Refusal { errno: libc::EPERM, message })
}

fn has_io_uring() -> bool {
    const NOTHING: c_long = 0;
    // SAFETY: without parameters the call fails in any case.
    let outcome = unsafe { libc::syscall(libc::SYS_io_uring_setup, NOTHING, NOTHING) };
    let error: Option<c_int> = std::io::Error::last_os_error().raw_os_error();
    outcome >= 0 || !matches!(error, Some(libc::ENOSYS | libc::EPERM))
}
