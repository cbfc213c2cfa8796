use super::*;
use crate::engine::tests as engine_tests;

struct Counting(u8);
impl Rng for Counting {
    fn fill(&mut self, buffer: &mut [u8]) {
        self.0 = self.0.wrapping_add(1);
        buffer.fill(self.0);
    }
}

fn connection() -> Connection {
    Connection { session_resumption: true, ..engine_tests::connection(engine_tests::B) }
}

fn peer(name: &str) -> PeerIdentity {
    let (id, local_id) = (Identity::Fqdn(name.to_owned()), Identity::Fqdn("gateway".to_owned()));
    PeerIdentity { id, local_id, proof: Proof::PreSharedKey, entry: "site".to_owned() }
}

fn grant(now: Instant, name: &str) -> Grant {
    let basis = Basis {
        proved_at: now,
        good_until: None,
        intermediates: Vec::new(),
        epoch: 0,
        rivals: Vec::new(),
        uses_ppk: false,
        resumed: false,
    };
    let (connection, peer, basis) = (Arc::new(connection()), Arc::new(peer(name)), Arc::new(basis));
    Grant { ike_sa: IkeSaId(7), connection, peer, basis }
}

fn suite() -> IkeSuite {
    let mut additional = AdditionalKe::NONE;
    additional.0[2] = Ke(35);
    let (encr, prf) = (Encr::AES_GCM_16, Prf::HMAC_SHA2_384);
    IkeSuite { encr, key_bits: 256, integ: Integ::NONE, prf, ke: Ke::X25519, additional }
}

const SPIS: Spis = Spis { initiator: 1, responder: 2 };
const HOUR: Duration = Duration::from_secs(3600);

struct Gateway {
    now: Instant,
    rng: Counting,
    tickets: Tickets,
}

impl Gateway {
    fn new(seed: u8) -> Self {
        Self { now: Instant::now(), rng: Counting(seed), tickets: Tickets::default() }
    }

    fn give(&mut self, name: &str, lifetime: Duration) -> (u64, Vec<u8>) {
        let d = Secret::new(vec![9; 48]);
        let keys = Keys { suite: suite(), spis: SPIS, d: &d };
        self.tickets.issue(self.now, &mut self.rng, grant(self.now, name), &keys, lifetime).unwrap()
    }

    fn refused(&self, ticket: &[u8]) -> &'static str {
        self.tickets.open(self.now, ticket).err().expect("a ticket that is refused")
    }
}

// RFC 5723 §5, §6.1: what the table marks "from the ticket" comes back, and none of it can be read.
#[test]
fn a_ticket_brings_back_what_it_was_made_of() {
    let mut gateway = Gateway::new(0);
    let (serial, ticket) = gateway.give("client.example.org", HOUR);
    let presented = gateway.tickets.open(gateway.now, &ticket).unwrap();
    assert_eq!((presented.serial, presented.suite), (serial, suite()));
    assert_eq!(presented.d.expose(), [9; 48]);
    assert_eq!((presented.grant.ike_sa, &*presented.grant.peer), (IkeSaId(7), &peer("client.example.org")));
    assert!(!ticket.windows(6).any(|window| window == b"client" || window == [9; 6]));
    assert!(ticket.len() < 300, "{} octets: it goes in one datagram", ticket.len());
    // §9.10: two tickets of one peer have nothing in common but the key.
    let (_, other) = gateway.give("client.example.org", HOUR);
    assert_ne!(ticket[HEAD..][..16], other[HEAD..][..16]);
}

// RFC 5723 §9.2.
#[test]
fn truncated_forged_and_oversized_tickets_are_refused() {
    let mut gateway = Gateway::new(0);
    let (_, ticket) = gateway.give("client", HOUR);
    for length in 0..ticket.len() {
        gateway.refused(&ticket[..length]);
    }
    for at in 0..ticket.len() {
        for bit in 0..8 {
            let mut changed = ticket.clone();
            changed[at] ^= 1 << bit;
            gateway.refused(&changed);
        }
    }
    gateway.refused(&[ticket.as_slice(), &[0]].concat());
    assert_eq!(gateway.refused(&vec![1; MAX_LENGTH + 1]), "the ticket is too long");
    assert!(gateway.tickets.open(gateway.now, &ticket).is_ok(), "nothing of that has changed anything");
    // An identity that would make it too long makes none.
    let d = Secret::new(vec![9; 48]);
    let keys = Keys { suite: suite(), spis: SPIS, d: &d };
    let long = grant(gateway.now, &"x".repeat(MAX_LENGTH));
    assert!(gateway.tickets.issue(gateway.now, &mut gateway.rng, long, &keys, HOUR).is_none());
    assert_eq!(gateway.tickets.counts(), (1, 0));
}

// RFC 5723 §9.5: the key is this process' own.
#[test]
fn a_ticket_of_another_gateway_is_refused() {
    let mut other = Gateway::new(100);
    let (_, foreign) = other.give("client", HOUR);
    let mut gateway = Gateway::new(0);
    assert_eq!(gateway.refused(&foreign), "the ticket is none of ours");
    gateway.give("client", HOUR);
    assert_eq!(gateway.refused(&foreign), "the ticket is none of ours");
}

// RFC 5723 §4.3.1, §6.2, §9.8: once, in its time, and not after it was withdrawn.
#[test]
fn a_ticket_is_good_once_and_for_its_time() {
    let mut gateway = Gateway::new(0);
    let (serial, ticket) = gateway.give("client", HOUR);
    let (withdrawn, withdrawn_ticket) = gateway.give("client", HOUR);
    let (late, late_ticket) = gateway.give("client", HOUR);
    assert!(gateway.tickets.redeem(gateway.now, serial));
    assert!(!gateway.tickets.redeem(gateway.now, serial));
    assert_eq!(gateway.refused(&ticket), "the ticket was used or withdrawn");
    assert!(gateway.tickets.revoke(withdrawn));
    assert!(!gateway.tickets.redeem(gateway.now, withdrawn));
    assert_eq!(gateway.refused(&withdrawn_ticket), "the ticket was used or withdrawn");
    gateway.now += HOUR - Duration::from_secs(1);
    assert!(gateway.tickets.open(gateway.now, &late_ticket).is_ok());
    gateway.now += Duration::from_secs(1);
    assert_eq!(gateway.refused(&late_ticket), "the ticket has expired");
    assert!(!gateway.tickets.redeem(gateway.now, late));
    assert_eq!(gateway.tickets.counts(), (0, 0));
}

// RFC 5723 §6.2, §9.5: keys change, and open what they made for as long as that is good.
#[test]
fn keys_rotate_and_are_forgotten() {
    let mut gateway = Gateway::new(0);
    let (_, first) = gateway.give("client", HOUR);
    gateway.now += ROTATION - Duration::from_secs(1);
    let (_, last) = gateway.give("client", 2 * LONGEST);
    assert_eq!(first[1..9], last[1..9]);
    gateway.now += Duration::from_secs(1);
    let (_, next) = gateway.give("client", HOUR);
    assert_ne!(last[1..9], next[1..9]);
    gateway.now += LONGEST - Duration::from_secs(2);
    assert!(gateway.tickets.open(gateway.now, &last).is_ok());
    gateway.now += Duration::from_secs(2);
    assert_eq!(gateway.refused(&last), "the ticket is none of ours");
    gateway.give("client", HOUR);
    assert_eq!(gateway.tickets.keys.len(), 1);
}

#[test]
fn all_tickets_end_with_a_change_of_credentials() {
    let mut gateway = Gateway::new(0);
    let (serial, ticket) = gateway.give("client", HOUR);
    let (d, ends) = (Secret::new(vec![1; 48]), gateway.now + HOUR);
    let held = Held { ticket: vec![1], ends, suite: suite(), d, grant: grant(gateway.now, "client") };
    gateway.tickets.hold(gateway.now, IpAddr::from([192, 0, 2, 1]), held);
    assert_eq!(gateway.tickets.counts(), (1, 1));
    gateway.tickets.forget_all();
    assert_eq!((gateway.tickets.counts(), gateway.tickets.epoch()), ((0, 0), 1));
    gateway.refused(&ticket);
    let (other, _) = gateway.give("client", HOUR);
    assert!(serial != other && !gateway.tickets.redeem(gateway.now, serial));
    gateway.refused(&ticket);
}

// RFC 5723 §9.3: what is full forgets, and forgetting lets nobody in.
#[test]
fn the_list_is_bounded() {
    let mut gateway = Gateway::new(0);
    let (_, first) = gateway.give("client", HOUR);
    for _ in 0..MAX_LIVE {
        gateway.give("client", 2 * HOUR);
    }
    assert_eq!(gateway.tickets.counts(), (MAX_LIVE, 0));
    assert_eq!(gateway.refused(&first), "the ticket was used or withdrawn");
}

// RFC 5723 §4.3.1, §9.7: presented once, in its time, and for the same connection, gateway and identity.
#[test]
fn a_client_uses_a_ticket_for_what_it_is_for() {
    let now = Instant::now();
    let at = IpAddr::from([192, 0, 2, 1]);
    let ours = Identity::Fqdn("gateway".to_owned());
    let with_ticket = || {
        let mut tickets = Tickets::default();
        let d = Secret::new(vec![1; 48]);
        let held = Held { ticket: vec![1], ends: now + HOUR, suite: suite(), d, grant: grant(now, "client") };
        tickets.hold(now, at, held);
        tickets
    };
    let mut tickets = with_ticket();
    assert!(tickets.has(now, &connection(), at, &ours) && tickets.take(now, &connection(), at, &ours).is_some());
    assert!(tickets.take(now, &connection(), at, &ours).is_none());
    let other_psk = Connection { ppk_required: true, ..connection() };
    let other_name = Connection { name: "other".to_owned(), ..connection() };
    let not_wanted = Connection { session_resumption: false, ..connection() };
    let too_old = Connection { reauth_time: Duration::from_secs(60), ..connection() };
    let elsewhere = IpAddr::from([192, 0, 2, 2]);
    let nobody = Identity::Fqdn("nobody".to_owned());
    let later = now + Duration::from_secs(60);
    for (number, (now, connection, gateway, id)) in [
        (now + HOUR, connection(), at, &ours),
        (now, other_psk, at, &ours),
        (now, other_name, at, &ours),
        (now, not_wanted, at, &ours),
        (later, too_old, at, &ours),
        (now, connection(), elsewhere, &ours),
        (now, connection(), at, &nobody),
    ]
    .into_iter()
    .enumerate()
    {
        let mut tickets = with_ticket();
        assert!(!tickets.has(now, &connection, gateway, id), "{number}");
        assert!(tickets.take(now, &connection, gateway, id).is_none(), "{number}");
    }
}
