//! What functions give back, and the message of the last failure.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use latch::blocking::ClientError;
use latch::protocol::Code;

/// Why a function failed.
pub(crate) struct Failure {
    status: Status,
    message: String,
}

macro_rules! statuses {
    ($($(#[$doc:meta])* $variant:ident = $number:literal $name:literal;)*) => {
        /// `enum latchkey_status`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Status {
            $($variant = $number,)*
        }

        #[cfg(test)]
        impl Status {
            pub(crate) const ALL: &[(Self, &str)] = &[$((Self::$variant, $name),)*];
        }

        /// The name of a number.
        pub(crate) fn name(status: c_int) -> &'static CStr {
            match status {
                $($number => as_c(concat!($name, "\0")),)*
                _ => c"unknown",
            }
        }
    };
}

statuses! {
    Ok = 0 "ok";
    Argument = 1 "argument";
    Handle = 2 "handle";
    Forked = 3 "forked";
    System = 4 "system";
    Gone = 5 "gone";
    Protocol = 6 "protocol";
    TooSmall = 7 "too-small";
    Absent = 8 "absent";
    Timeout = 9 "timeout";
    Internal = 10 "internal";
    Ended = 11 "ended";
    NoSa = 32 "no-sa";
    WrongPeer = 33 "wrong-peer";
    WrongProtection = 34 "wrong-protection";
    Conflict = 35 "conflict";
    Exists = 36 "exists";
    NotAccepted = 37 "not-accepted";
    NoBinding = 38 "no-binding";
    Permission = 39 "permission";
    Socket = 40 "socket";
    Identity = 41 "identity";
    Unenforced = 42 "unenforced";
    Limit = 43 "limit";
    Policy = 44 "policy";
    Refused = 63 "refused";
}

fn as_c(text: &'static str) -> &'static CStr {
    CStr::from_bytes_with_nul(text.as_bytes()).unwrap_or(c"unknown")
}

impl Failure {
    pub(crate) fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let status = match &error {
            ClientError::System { .. } => Status::System,
            ClientError::Protocol(_) => Status::Protocol,
            ClientError::Closed => Status::Gone,
            ClientError::Silent(_) => Status::Timeout,
            ClientError::Refused(refusal) => match refusal.code {
                Code::NoSa => Status::NoSa,
                Code::WrongPeer => Status::WrongPeer,
                Code::WrongProtection => Status::WrongProtection,
                Code::Conflict => Status::Conflict,
                Code::Exists => Status::Exists,
                Code::NotAccepted => Status::NotAccepted,
                Code::NoBinding => Status::NoBinding,
                Code::Permission => Status::Permission,
                Code::Socket | Code::Descriptor => Status::Socket,
                Code::Identity => Status::Identity,
                Code::Unenforced => Status::Unenforced,
                Code::Limit => Status::Limit,
                Code::Policy => Status::Policy,
                _ => Status::Refused,
            },
        };
        Self { status, message: error.to_string() }
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs a function's body; notes why it failed.
pub(crate) fn guarded(body: impl FnOnce() -> Result<(), Failure>) -> c_int {
    // What a panic leaves behind is behind locks that do not mind, and handles that stay as they were.
    let outcome = catch_unwind(AssertUnwindSafe(body));
    let outcome = outcome.unwrap_or_else(|_| Err(Failure::new(Status::Internal, "a fault of the library")));
    let (status, message) = match outcome {
        Ok(()) => (Status::Ok, String::new()),
        Err(Failure { status, message }) => (status, message),
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // At the end of a thread there is nobody left to read it.
    let _ = LAST.try_with(|last| last.replace(message));
    status as c_int
}

/// The message of this thread's last call.
pub(crate) fn last_message() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}
