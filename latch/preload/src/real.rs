//! The C library's own functions.

use std::ffi::{CStr, c_int, c_uint, c_ulong, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{FILE, mmsghdr, msghdr, size_t, sockaddr, socklen_t, ssize_t};

macro_rules! real {
    ($($name:ident: $type:ty;)*) => {
        $(
            /// The C library's function of this name.
            pub(crate) fn $name() -> $type {
                static FOUND: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
                let found = next(&FOUND, concat!(stringify!($name), "\0"));
                // SAFETY: the C library's function of this name has this type.
                unsafe { std::mem::transmute::<*mut c_void, $type>(found) }
            }
        )*
    };
}

real! {
    connect: unsafe extern "C" fn(c_int, *const sockaddr, socklen_t) -> c_int;
    listen: unsafe extern "C" fn(c_int, c_int) -> c_int;
    accept4: unsafe extern "C" fn(c_int, *mut sockaddr, *mut socklen_t, c_int) -> c_int;
    sendto: unsafe extern "C" fn(c_int, *const c_void, size_t, c_int, *const sockaddr, socklen_t) -> ssize_t;
    sendmsg: unsafe extern "C" fn(c_int, *const msghdr, c_int) -> ssize_t;
    sendmmsg: unsafe extern "C" fn(c_int, *mut mmsghdr, c_uint, c_int) -> c_int;
    read: unsafe extern "C" fn(c_int, *mut c_void, size_t) -> ssize_t;
    recv: unsafe extern "C" fn(c_int, *mut c_void, size_t, c_int) -> ssize_t;
    recvfrom: unsafe extern "C" fn(c_int, *mut c_void, size_t, c_int, *mut sockaddr, *mut socklen_t) -> ssize_t;
    recvmsg: unsafe extern "C" fn(c_int, *mut msghdr, c_int) -> ssize_t;
    getsockopt: unsafe extern "C" fn(c_int, c_int, c_int, *mut c_void, *mut socklen_t) -> c_int;
    close: unsafe extern "C" fn(c_int) -> c_int;
    fclose: unsafe extern "C" fn(*mut FILE) -> c_int;
    close_range: unsafe extern "C" fn(c_uint, c_uint, c_int) -> c_int;
    closefrom: unsafe extern "C" fn(c_int);
    dup: unsafe extern "C" fn(c_int) -> c_int;
    dup2: unsafe extern "C" fn(c_int, c_int) -> c_int;
    dup3: unsafe extern "C" fn(c_int, c_int, c_int) -> c_int;
    fcntl: unsafe extern "C" fn(c_int, c_int, ...) -> c_int;
    fcntl64: unsafe extern "C" fn(c_int, c_int, ...) -> c_int;
    ioctl: unsafe extern "C" fn(c_int, c_ulong, ...) -> c_int;
}

fn next(found: &AtomicPtr<c_void>, name: &str) -> *mut c_void {
    let known = found.load(Ordering::Acquire);
    if !known.is_null() {
        return known;
    }
    let looked_up = CStr::from_bytes_with_nul(name.as_bytes()).map_or(std::ptr::null_mut(), |name| {
        // SAFETY: a name that ends with a zero; the next library that has it is the C library, or another that is
        // preloaded.
        unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) }
    });
    if looked_up.is_null() {
        crate::policy::say(&format!("the C library has no {}: it is too old", name.trim_end_matches('\0')));
        // SAFETY: ends the process; without the function nothing can be done in its place.
        unsafe { libc::_exit(126) };
    }
    found.store(looked_up, Ordering::Release);
    looked_up
}
