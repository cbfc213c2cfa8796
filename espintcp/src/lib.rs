//! TCP encapsulation of IKE and IPsec packets (RFC 9329): the stream prefix and framing as a sans-IO codec,
//! and the tokio streams that carry it, in TLS or not. Knows nothing of what IKE messages mean.

#![forbid(unsafe_code)]

pub mod codec;
#[doc(hidden)]
pub mod fuzzing;
pub mod streams;
pub mod tls;
