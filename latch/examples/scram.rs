//! SCRAM-SHA-256-PLUS (RFC 5802, RFC 7677) over latched connections: the password's exchange is bound to the IPsec channel
//! (RFC 5056), so that whoever relays it between two channels of its own, with IPsec identities that both ends admit, gets
//! nothing.
//!
//! ```text
//! scram server LATCH_SOCKET ADDRESS:PORT USER PASSWORD
//! scram client LATCH_SOCKET ADDRESS:PORT USER PASSWORD
//! ```
//!
//! The exchange is that of the crate `rsasl`. With `--unbound` at the end both ends take SCRAM-SHA-256 instead: what it
//! is like without the binding.

use std::error::Error;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_lc_rs::{digest, hmac, pbkdf2};
use latchkey_latch::blocking::{Client, TcpStream};
use latchkey_latch::protocol::ChannelBinding;
use rsasl::callback::{Context, Request, SessionCallback, SessionData};
use rsasl::config::SASLConfig;
use rsasl::mechanisms::scram::properties::ScramStoredPassword;
use rsasl::mechanisms::scram::{SCRAM_SHA256, SCRAM_SHA256_PLUS};
use rsasl::prelude::{Mechanism, Mechname, Registry, SASLClient, SASLServer, SessionError, State, Validation};
use rsasl::property::{AuthId, ChannelBindingName, ChannelBindings, OverrideCBType, Password};
use rsasl::validate::{Validate, ValidationError};

static BOUND: &[Mechanism] = &[SCRAM_SHA256_PLUS];
static UNBOUND: &[Mechanism] = &[SCRAM_SHA256];

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (arguments, bound) = match arguments.split_last() {
        Some((last, rest)) if last == "--unbound" => (rest, false),
        _ => (arguments.as_slice(), true),
    };
    let [role, socket, address, user, password] = arguments else {
        return Err("scram server|client LATCH_SOCKET ADDRESS:PORT USER PASSWORD [--unbound]".into());
    };
    let (client, address): (_, SocketAddr) = (Client::connect(socket)?, address.parse()?);
    let secret = Secret { user: user.clone(), password: password.clone() };
    if role == "client" {
        // Any IPsec peer: the exchange says whether it is the one who has the password's verifier.
        let stream = client.latch_tcp(address, None, "%any")?;
        println!("connected to {}", stream.peer_identity().id.text);
        authenticate(stream, secret, bound)?;
        println!("authenticated");
        return Ok(());
    }
    let listener = client.listen_tcp(address, "%any")?;
    println!("listening");
    loop {
        let (stream, _) = listener.accept()?;
        let peer = stream.peer_identity().id.text.clone();
        match serve(stream, &secret, bound) {
            Ok(user) => println!("{user} authenticated through {peer}"),
            Err(error) => println!("refused through {peer}: {error}"),
        }
    }
}

struct Secret {
    user: String,
    password: String,
}

/// What an end offers, and its name.
fn mechanism(bound: bool) -> Result<(Registry, &'static Mechname), Box<dyn Error>> {
    let (mechanisms, name): (_, &[u8]) =
        if bound { (BOUND, b"SCRAM-SHA-256-PLUS") } else { (UNBOUND, b"SCRAM-SHA-256") };
    Ok((Registry::with_mechanisms(mechanisms), Mechname::parse(name)?))
}

/// Authenticates us to the server, and it to us.
fn authenticate(mut stream: TcpStream, secret: Secret, bound: bool) -> Result<(), Box<dyn Error>> {
    let (registry, name) = mechanism(bound)?;
    let binding = bound.then(|| stream.channel_binding()).transpose()?;
    let config = SASLConfig::builder().with_registry(registry).with_callback(OurSide { secret, binding })?;
    let mut session = SASLClient::new(config).start_suggested_iter([name])?;
    let mut message = Vec::new();
    let mut state = session.step(None, &mut message)?;
    send(&mut stream, &message)?;
    while state == State::Running {
        let answer = receive(&mut stream)?;
        message.clear();
        // The last answer proves that the server has the password's verifier, and saw the same channel.
        state = session.step(Some(&answer), &mut message)?;
        if state.has_sent_message() {
            send(&mut stream, &message)?;
        }
    }
    Ok(())
}

struct OurSide {
    secret: Secret,
    binding: Option<ChannelBinding>,
}

impl SessionCallback for OurSide {
    fn callback(&self, _: &SessionData, context: &Context, request: &mut Request) -> Result<(), SessionError> {
        request.satisfy::<AuthId>(&self.secret.user)?.satisfy::<Password>(self.secret.password.as_bytes())?;
        if let Some(binding) = &self.binding {
            request.satisfy::<OverrideCBType>(&binding.kind)?;
            if context.get_ref::<ChannelBindingName>() == Some(&binding.kind) {
                request.satisfy::<ChannelBindings>(&binding.data)?;
            }
        }
        Ok(())
    }

    fn enable_channel_binding(&self) -> bool {
        self.binding.is_some()
    }
}

/// Authenticates a client; gives its name.
fn serve(mut stream: TcpStream, secret: &Secret, bound: bool) -> Result<String, Box<dyn Error>> {
    let (registry, name) = mechanism(bound)?;
    let binding = bound.then(|| stream.channel_binding()).transpose()?;
    let used = Arc::new(AtomicBool::new(false));
    let callback =
        TheirSide { user: secret.user.clone(), verifier: Verifier::of(secret), binding, used: Arc::clone(&used) };
    let config = SASLConfig::builder().with_registry(registry).with_callback(callback)?;
    let mut session = SASLServer::<Authenticated>::new(config).start_suggested(name)?;
    let (mut message, mut state) = (Vec::new(), State::Running);
    while state == State::Running {
        let asked = receive(&mut stream)?;
        message.clear();
        let stepped = session.step(Some(&asked), &mut message);
        if !message.is_empty() {
            send(&mut stream, &message)?;
        }
        state = stepped?;
        // RFC 5802 §6: under the -PLUS name a client that says that it does not bind is refused. The crate leaves
        // that to us.
        if bound && !used.load(Ordering::Relaxed) {
            return Err("the client does not bind to the channel".into());
        }
    }
    // What the crate sends when the exchange fails is an end, too: only this says that it succeeded.
    session.validation().ok_or_else(|| String::from_utf8_lossy(&message).into_owned().into())
}

struct Authenticated;

impl Validation for Authenticated {
    type Value = String;
}

/// What a server keeps of a password (RFC 5802 §3).
struct Verifier {
    salt: [u8; 16],
    stored_key: Vec<u8>,
    server_key: Vec<u8>,
}

const ITERATIONS: NonZeroU32 = NonZeroU32::new(4096).unwrap();

impl Verifier {
    fn of(secret: &Secret) -> Self {
        // A server with users makes a random one for each when the password is set, and keeps it.
        let salt = *b"salt of examples";
        let mut salted = [0; 32];
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, ITERATIONS, &salt, secret.password.as_bytes(), &mut salted);
        let key = hmac::Key::new(hmac::HMAC_SHA256, &salted);
        let client_key = hmac::sign(&key, b"Client Key");
        let stored_key = digest::digest(&digest::SHA256, client_key.as_ref()).as_ref().to_vec();
        Self { salt, stored_key, server_key: hmac::sign(&key, b"Server Key").as_ref().to_vec() }
    }
}

struct TheirSide {
    user: String,
    verifier: Verifier,
    binding: Option<ChannelBinding>,
    /// The client has named our type of binding, so the exchange covers the data.
    used: Arc<AtomicBool>,
}

impl SessionCallback for TheirSide {
    fn callback(&self, _: &SessionData, context: &Context, request: &mut Request) -> Result<(), SessionError> {
        if context.get_ref::<AuthId>() == Some(&self.user) {
            let Verifier { salt, stored_key, server_key } = &self.verifier;
            request.satisfy::<ScramStoredPassword>(&ScramStoredPassword::new(
                ITERATIONS.get(),
                salt,
                stored_key,
                server_key,
            ))?;
        }
        if let Some(binding) = &self.binding
            && context.get_ref::<ChannelBindingName>() == Some(&binding.kind)
        {
            self.used.store(true, Ordering::Relaxed);
            request.satisfy::<ChannelBindings>(&binding.data)?;
        }
        Ok(())
    }

    fn validate(&self, _: &SessionData, context: &Context, validate: &mut Validate<'_>) -> Result<(), ValidationError> {
        let user = context.get_ref::<AuthId>().unwrap_or_default();
        validate.with::<Authenticated, _>(|| Ok(user.to_owned()))?;
        Ok(())
    }
}

/// A message is its length in two octets, and itself.
fn send(stream: &mut TcpStream, message: &[u8]) -> Result<(), Box<dyn Error>> {
    let length = u16::try_from(message.len())?;
    Ok(stream.write_all(&[&length.to_be_bytes(), message].concat())?)
}

fn receive(stream: &mut TcpStream) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}
