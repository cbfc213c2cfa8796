//! What can be wrong with an authentic message or an attempt, and the one place that turns it into a
//! Notify (RFC 7296 §3.10.1).

use ipsec::transform::{Ke, Protocol};

use crate::crypto::KeyError;
use crate::wire::{Notify, NotifyType, Payload};

/// Why an exchange fails; each has its notify message type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    #[error("the message is malformed: {0}")]
    InvalidSyntax(String),
    #[error("unsupported critical payload {0}")]
    UnsupportedCritical(u8),
    #[error("no acceptable proposal found")]
    NoProposalChosen,
    #[error("the key exchange method is not acceptable, {0:?} is")]
    InvalidKe(Ke),
    #[error("authentication failed")]
    AuthenticationFailed,
    #[error("no acceptable traffic selectors found")]
    TsUnacceptable,
    #[error("busy, try later")]
    TemporaryFailure,
    #[error("there is no CHILD_SA with SPI {0:08x}")]
    ChildSaNotFound(u32),
    #[error("there is a NAT on the path")]
    UnexpectedNat,
    #[error("no more CHILD_SAs are possible")]
    NoAdditionalSas,
    #[error("there is no key exchange that this one goes on with")]
    StateNotFound,
    #[error("no virtual IP can be assigned")]
    InternalAddressFailure,
    #[error("a virtual IP must be asked for")]
    FailedCpRequired,
}

impl Fault {
    /// The Notify that tells the peer.
    pub(crate) fn notify(&self) -> Notify {
        let (kind, data) = match self {
            Self::InvalidSyntax(_) => (NotifyType::INVALID_SYNTAX, Vec::new()),
            // RFC 7296 §2.5: one octet, the payload type.
            Self::UnsupportedCritical(kind) => (NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD, vec![*kind]),
            Self::NoProposalChosen => (NotifyType::NO_PROPOSAL_CHOSEN, Vec::new()),
            // RFC 7296 §1.3: two octets, the accepted group.
            Self::InvalidKe(group) => (NotifyType::INVALID_KE_PAYLOAD, group.0.to_be_bytes().to_vec()),
            Self::AuthenticationFailed => (NotifyType::AUTHENTICATION_FAILED, Vec::new()),
            Self::TsUnacceptable => (NotifyType::TS_UNACCEPTABLE, Vec::new()),
            Self::TemporaryFailure => (NotifyType::TEMPORARY_FAILURE, Vec::new()),
            Self::ChildSaNotFound(spi) => {
                return Notify {
                    protocol: Protocol::ESP,
                    spi: spi.to_be_bytes().to_vec(),
                    kind: NotifyType::CHILD_SA_NOT_FOUND,
                    data: Vec::new(),
                };
            }
            Self::UnexpectedNat => (NotifyType::UNEXPECTED_NAT_DETECTED, Vec::new()),
            // RFC 9370 §2.2.4: no data.
            Self::StateNotFound => (NotifyType::STATE_NOT_FOUND, Vec::new()),
            Self::NoAdditionalSas => (NotifyType::NO_ADDITIONAL_SAS, Vec::new()),
            Self::InternalAddressFailure => (NotifyType::INTERNAL_ADDRESS_FAILURE, Vec::new()),
            Self::FailedCpRequired => (NotifyType::FAILED_CP_REQUIRED, Vec::new()),
        };
        Notify { protocol: Protocol::NONE, spi: Vec::new(), kind, data }
    }

    /// The Notify as a payload.
    pub(crate) fn payload(&self) -> Payload {
        Payload::Notify(self.notify())
    }
}

impl From<KeyError> for Fault {
    fn from(error: KeyError) -> Self {
        match error {
            KeyError::Unsupported => Self::NoProposalChosen,
            KeyError::PublicValue => Self::InvalidSyntax(error.to_string()),
        }
    }
}

/// IANA's name of a notify message type, for the log.
pub(crate) fn notify_name(kind: NotifyType) -> String {
    let name = match kind {
        NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD => "UNSUPPORTED_CRITICAL_PAYLOAD",
        NotifyType::INVALID_IKE_SPI => "INVALID_IKE_SPI",
        NotifyType::INVALID_MAJOR_VERSION => "INVALID_MAJOR_VERSION",
        NotifyType::INVALID_SYNTAX => "INVALID_SYNTAX",
        NotifyType::INVALID_MESSAGE_ID => "INVALID_MESSAGE_ID",
        NotifyType::INVALID_SPI => "INVALID_SPI",
        NotifyType::NO_PROPOSAL_CHOSEN => "NO_PROPOSAL_CHOSEN",
        NotifyType::INVALID_KE_PAYLOAD => "INVALID_KE_PAYLOAD",
        NotifyType::AUTHENTICATION_FAILED => "AUTHENTICATION_FAILED",
        NotifyType::SINGLE_PAIR_REQUIRED => "SINGLE_PAIR_REQUIRED",
        NotifyType::NO_ADDITIONAL_SAS => "NO_ADDITIONAL_SAS",
        NotifyType::INTERNAL_ADDRESS_FAILURE => "INTERNAL_ADDRESS_FAILURE",
        NotifyType::FAILED_CP_REQUIRED => "FAILED_CP_REQUIRED",
        NotifyType::TS_UNACCEPTABLE => "TS_UNACCEPTABLE",
        NotifyType::INVALID_SELECTORS => "INVALID_SELECTORS",
        NotifyType::UNACCEPTABLE_ADDRESSES => "UNACCEPTABLE_ADDRESSES",
        NotifyType::UNEXPECTED_NAT_DETECTED => "UNEXPECTED_NAT_DETECTED",
        NotifyType::TEMPORARY_FAILURE => "TEMPORARY_FAILURE",
        NotifyType::CHILD_SA_NOT_FOUND => "CHILD_SA_NOT_FOUND",
        NotifyType::STATE_NOT_FOUND => "STATE_NOT_FOUND",
        NotifyType(other) => return format!("({other})"),
    };
    name.to_owned()
}

/// True for error types (RFC 7296 §3.10.1: below 16384).
pub(crate) fn is_error(kind: NotifyType) -> bool {
    kind.0 < 16384
}

/// A status or error Notify that concerns no SA.
pub(crate) fn notify(kind: NotifyType, data: Vec<u8>) -> Payload {
    Payload::Notify(Notify { protocol: Protocol::NONE, spi: Vec::new(), kind, data })
}
