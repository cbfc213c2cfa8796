//! Both ends of EAP against each other, and what must not lead to a success.

use crate::identity::IdentityPattern;

use super::*;

const SERVER_CHALLENGE: [u8; 16] = [7; 16];
const PEER_CHALLENGE: [u8; 16] = [9; 16];

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

fn credentials(owner: &str, password: &str) -> Credentials {
    let mut credentials = Credentials::new();
    let owners = vec![IdentityPattern::parse(owner).unwrap()];
    credentials.add_eap_secret(Some("eap".to_owned()), owners, Secret::new(password.into())).unwrap();
    credentials
}

fn server(user: &str) -> (EapServer, Vec<u8>) {
    EapServer::begin(EapMethod::MsChapV2, id(user), id("gateway.example"), 40, SERVER_CHALLENGE)
}

fn peer(user: &str) -> EapPeer {
    EapPeer::new(EapMethod::MsChapV2, id(user), id("gateway.example"), PEER_CHALLENGE)
}

fn answer(step: EapPeerStep) -> (EapPeer, Vec<u8>) {
    match step {
        EapPeerStep::Answer(peer, packet) => (peer, packet),
        other => panic!("{other:?}"),
    }
}

fn ask(step: EapServerStep) -> (EapServer, Vec<u8>) {
    match step {
        EapServerStep::Ask(server, packet) => (server, packet),
        other => panic!("{other:?}"),
    }
}

fn server_fails(step: EapServerStep, why: &str) {
    match step {
        EapServerStep::Failed { packet, reason } => {
            assert_eq!((packet[0], &packet[2..]), (FAILURE, &[0, 4][..]));
            assert!(reason.contains(why), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

fn peer_fails(step: EapPeerStep, why: &str) {
    match step {
        EapPeerStep::Failed(reason) => assert!(reason.contains(why), "{reason}"),
        other => panic!("{other:?}"),
    }
}

// RFC 2759, RFC 3748 §2: the whole exchange, and one key at both ends.
#[test]
fn both_ends_come_to_the_same_key() {
    let known = credentials("carol", "pass wörd");
    let (at_server, challenge) = server("carol");
    let (at_peer, response) = answer(known.eap_peer(peer("carol"), &challenge));
    assert_eq!((response[0], response[1], response[4]), (RESPONSE, 40, MS_CHAPV2));
    let (at_server, shown) = ask(known.eap_server(at_server, &response));
    let (at_peer, seen) = answer(known.eap_peer(at_peer, &shown));
    let EapServerStep::Succeeded { packet, msk } = known.eap_server(at_server, &seen) else { panic!("no success") };
    assert_eq!(packet, [SUCCESS, 41, 0, 4]);
    let EapPeerStep::Succeeded(same) = known.eap_peer(at_peer, &packet) else { panic!("no success") };
    assert!(msk.matches(same.expose()));
}

// RFC 2759 §6: a wrong password, an unknown user, another's password: the same messages, and no key.
#[test]
fn who_does_not_know_the_password_gets_the_same_answer_whoever_it_says_it_is() {
    let known = credentials("carol", "right");
    let (at_server, _) = server("carol");
    drop(at_server);
    for (user, password) in [("carol", "wrong"), ("dave", "right"), ("dave", "wrong"), ("gateway.example", "right")] {
        let (at_server, challenge) = server(user);
        let theirs = credentials(user, password);
        let (at_peer, response) = answer(theirs.eap_peer(peer(user), &challenge));
        let (at_server, refusal) = ask(known.eap_server(at_server, &response));
        assert!(refusal.windows(5).any(|part| part == b"E=691"));
        let (at_peer, seen) = answer(theirs.eap_peer(at_peer, &refusal));
        server_fails(known.eap_server(at_server, &seen), if user == "carol" { "wrong" } else { "no EAP secret" });
        peer_fails(theirs.eap_peer(at_peer, &[FAILURE, 41, 0, 4]), "wrong (EAP-MSCHAPv2 error 691)");
    }
}

// A secret of no named owner lets nobody in, and nobody is us, also where the secret names us.
#[test]
fn secrets_have_owners_and_we_are_no_peer_of_ours() {
    let mut everybodys = Credentials::new();
    everybodys.add_eap_secret(None, Vec::new(), Secret::new(b"right".to_vec())).unwrap();
    assert!(everybodys.eap_secret_of(&id("carol"), &id("gateway.example")).is_none());
    assert!(everybodys.eap_secret_for(&id("carol"), &id("gateway.example")).is_some());
    let mut both = Credentials::new();
    let owners = ["carol", "gateway.example"].map(|owner| IdentityPattern::parse(owner).unwrap()).to_vec();
    both.add_eap_secret(None, owners, Secret::new(b"right".to_vec())).unwrap();
    assert!(both.eap_secret_of(&id("carol"), &id("gateway.example")).is_some());
    assert!(both.eap_secret_of(&id("gateway.example"), &id("gateway.example")).is_none());
    // Nor is a secret for IKE one for EAP, or the other way round.
    let mut ike = Credentials::new();
    ike.add_shared_secret(None, vec![IdentityPattern::parse("carol").unwrap()], Secret::new(b"right".to_vec()))
        .unwrap();
    assert!(ike.eap_secret_of(&id("carol"), &id("gateway.example")).is_none());
    assert!(credentials("carol", "right").shared_secret(&id("gateway.example"), Some(&id("carol"))).is_none());
}

// CVE-2021-45079: EAP-Success out of turn. In each state but the last it ends the exchange without a key.
#[test]
fn an_early_eap_success_is_a_failure() {
    let known = credentials("carol", "right");
    let success = [SUCCESS, 40, 0, 4];
    peer_fails(known.eap_peer(peer("carol"), &success), "before the method was through");
    let (at_server, challenge) = server("carol");
    let (at_peer, response) = answer(known.eap_peer(peer("carol"), &challenge));
    peer_fails(known.eap_peer(at_peer, &success), "before the method was through");
    let (at_peer, _) = answer(known.eap_peer(peer("carol"), &challenge));
    // A gateway that does not know the password cannot make the proof that comes before.
    let (_, mut shown) = ask(known.eap_server(at_server, &response));
    let digit = shown.windows(2).position(|two| two == b"S=").unwrap() + 2;
    shown[digit] = if shown[digit] == b'0' { b'1' } else { b'0' };
    peer_fails(known.eap_peer(at_peer, &shown), "does not know the password");
    // Nor does a peer's word make it one.
    let (at_server, _) = server("carol");
    server_fails(known.eap_server(at_server, &success), "out of turn");
    let (at_server, _) = server("carol");
    server_fails(known.eap_server(at_server, &typed(RESPONSE, 40, MS_CHAPV2, &[3])), "malformed");
    // After a refusal "success" is still none.
    let (at_server, challenge) = server("carol");
    let (_, response) = answer(credentials("carol", "wrong").eap_peer(peer("carol"), &challenge));
    let (at_server, _) = ask(known.eap_server(at_server, &response));
    server_fails(known.eap_server(at_server, &typed(RESPONSE, 41, MS_CHAPV2, &[3])), "password is wrong");
}

// RFC 3748 §4, RFC 7296 §3.16: lengths, identifiers, codes and types, on both sides; CVE-2025-62291: lengths within.
#[test]
fn malformed_packets_and_packets_out_of_turn_are_failures() {
    let known = credentials("carol", "right");
    let (_, challenge) = server("carol");
    let (_, response) = answer(known.eap_peer(peer("carol"), &challenge));
    for cut in 0..response.len() {
        let (at_server, _) = server("carol");
        server_fails(known.eap_server(at_server, &response[..cut]), "malformed");
        // With a length that fits what is left.
        let mut shorter = response[..cut].to_vec();
        if let Some(length) = shorter.get_mut(2..4) {
            length.copy_from_slice(&(cut as u16).to_be_bytes());
        }
        let (at_server, _) = server("carol");
        assert!(matches!(known.eap_server(at_server, &shorter), EapServerStep::Failed { .. }), "{cut}");
    }
    for cut in 0..challenge.len() {
        let mut shorter = challenge[..cut].to_vec();
        if let Some(length) = shorter.get_mut(2..4) {
            length.copy_from_slice(&(cut as u16).to_be_bytes());
        }
        assert!(matches!(known.eap_peer(peer("carol"), &shorter), EapPeerStep::Failed(_)), "{cut}");
    }
    let mut long = response.clone();
    long.push(0);
    let (at_server, _) = server("carol");
    server_fails(known.eap_server(at_server, &long), "malformed");
    let wrong = |change: fn(&mut Vec<u8>), why: &str| {
        let mut changed = response.clone();
        change(&mut changed);
        let (at_server, _) = server("carol");
        server_fails(known.eap_server(at_server, &changed), why);
    };
    wrong(|packet| packet[1] += 1, "another request");
    wrong(|packet| packet[0] = REQUEST, "out of turn");
    wrong(|packet| packet[4] = NAK, "refuses EAP_MSCHAPV2");
    wrong(|packet| packet[4] = IDENTITY, "out of turn");
    wrong(|packet| packet[4] = 254, "out of turn");
    wrong(|packet| packet[6] += 1, "malformed");
    wrong(|packet| packet[8] -= 1, "malformed");
    wrong(|packet| packet[9] = 48, "malformed");
    // A name of more octets than there may be, and another's name under the right password.
    let named = |name: &[u8]| {
        let data = &response[5..response.len() - 5];
        let mut data = [data, name].concat();
        let length = (data.len() as u16).to_be_bytes();
        data[2..4].copy_from_slice(&length);
        typed(RESPONSE, 40, MS_CHAPV2, &data)
    };
    let (at_server, _) = server("carol");
    server_fails(known.eap_server(at_server, &named(&[b'a'; 257])), "malformed");
    let (at_server, _) = server("carol");
    let (at_server, _) = ask(known.eap_server(at_server, &named(b"dave")));
    server_fails(known.eap_server(at_server, &typed(RESPONSE, 41, MS_CHAPV2, &[4])), "another name");
    for packet in [vec![SUCCESS, 40, 0, 5, 0], vec![FAILURE, 40, 0, 3], vec![5, 40, 0, 4], vec![REQUEST, 40, 0, 4]] {
        peer_fails(known.eap_peer(peer("carol"), &packet), "malformed");
    }
    let huge = typed(REQUEST, 1, IDENTITY, &vec![0; MAX_PACKET]);
    peer_fails(known.eap_peer(peer("carol"), &huge), "malformed");
}

// RFC 3748 §5: what a peer says to requests of other types.
#[test]
fn a_peer_answers_identity_and_notification_and_refuses_other_methods() {
    let known = credentials("carol", "right");
    let (at_peer, said) = answer(known.eap_peer(peer("carol"), &[REQUEST, 1, 0, 5, IDENTITY]));
    assert_eq!(said, [&[RESPONSE, 1, 0, 10, IDENTITY], &b"carol"[..]].concat());
    let (at_peer, said) = answer(known.eap_peer(at_peer, &[REQUEST, 2, 0, 6, NOTIFICATION, b'!']));
    assert_eq!(said, [RESPONSE, 2, 0, 5, NOTIFICATION]);
    let (at_peer, said) = answer(known.eap_peer(at_peer, &[REQUEST, 3, 0, 6, 13, 0x20]));
    assert_eq!(said, [RESPONSE, 3, 0, 6, NAK, MS_CHAPV2]);
    // §5.3.2: an expanded type gets the same.
    let expanded = [REQUEST, 4, 0, 13, 254, 0, 0, 0, 0, 0, 0, 0, 13];
    let (at_peer, said) = answer(known.eap_peer(at_peer, &expanded));
    assert_eq!(said, [RESPONSE, 4, 0, 6, NAK, MS_CHAPV2]);
    let (_, challenge) = server("carol");
    let (at_peer, _) = answer(known.eap_peer(at_peer, &challenge));
    // In the middle of its method there is no other, no identity, and no second challenge.
    for kind in [IDENTITY, 13, NAK] {
        let (at_peer, _) = answer(known.eap_peer(peer("carol"), &challenge));
        peer_fails(known.eap_peer(at_peer, &[REQUEST, 4, 0, 5, kind]), "out of turn");
    }
    peer_fails(known.eap_peer(at_peer, &challenge), "out of turn");
    peer_fails(Credentials::new().eap_peer(peer("carol"), &challenge), "no EAP secret");
}

// CVE-2026-47895 and others: identities of no octets, with NUL, of patterns, too long.
#[test]
fn an_eap_identity_is_a_name_or_a_mail_address() {
    assert_eq!(identity(b"carol"), Some(id("carol")));
    assert_eq!(identity(b"carol@example.org"), Some(id("carol@example.org")));
    assert_eq!(identity(b"DOMAIN\\carol"), Some(Identity::Fqdn("DOMAIN\\carol".to_owned())));
    for odd in [&b""[..], b"*", b"*@example.org", b"car\0ol", b"\xff", b" carol", &[b'a'; 257]] {
        assert_eq!(identity(odd), None, "{odd:?}");
    }
    for kept in [&b"@#"[..], b"dns:#", b"%any", b"10.0.0.1", b"C=CH"] {
        assert!(matches!(identity(kept), Some(Identity::Fqdn(text)) if text.as_bytes() == kept));
    }
    let (asked, request) = AskedIdentity::begin(3);
    assert_eq!(request, [REQUEST, 3, 0, 5, IDENTITY]);
    assert_eq!(asked.next_identifier(), 4);
    assert_eq!(asked.answered(&typed(RESPONSE, 3, IDENTITY, b"carol")), Ok(id("carol")));
    for wrong in [typed(RESPONSE, 4, IDENTITY, b"a"), typed(RESPONSE, 3, NAK, b"a"), typed(REQUEST, 3, IDENTITY, b"a")]
    {
        assert!(AskedIdentity::begin(3).0.answered(&wrong).is_err());
    }
    assert!(AskedIdentity::begin(3).0.answered(&[SUCCESS, 3, 0, 4]).is_err());
}
