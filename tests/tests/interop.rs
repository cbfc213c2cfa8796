//! Interoperation with strongSwan, both roles: the real daemon of Debian with ESP in user space.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use latchkey_tests::actions;
use latchkey_tests::daemon::Kind::{self, Latchkey, Strongswan};
use latchkey_tests::host::wait_for;
use latchkey_tests::pki::Authority;
use latchkey_tests::scene::{Auth, INNER_A, INNER_B, Scene, Suite, configurations, hosts};

const ROLES: [(Kind, Kind); 2] = [(Latchkey, Strongswan), (Strongswan, Latchkey)];

fn both_roles(suite: &Suite) {
    for (initiator, responder) in ROLES {
        Scene::works(initiator, responder, suite);
    }
}

// When this fails, the scene is at fault, not Latchkey.
#[test]
fn the_scene_works_with_strongswan_alone() {
    let suite = Suite { auth: Auth::Certificates(&rcgen::PKCS_RSA_SHA256), ..Suite::default() };
    let scene = Scene::works(Strongswan, Strongswan, &suite);
    scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 4 << 20);
}

#[test]
fn psk_and_aes_gcm_with_a_bulk_transfer() {
    for (initiator, responder) in ROLES {
        let scene = Scene::works(initiator, responder, &Suite::default());
        scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 4 << 20);
        scene.host_b.transfers_whole(INNER_B, &scene.host_a, INNER_A, 4 << 20);
    }
}

#[test]
fn aes_cbc_with_hmac_sha2_256() {
    both_roles(&Suite { ike: "aes128-sha256-ecp256", esp: "aes128-sha256", ..Suite::default() });
}

#[test]
fn aes_cbc_with_hmac_sha2_384() {
    both_roles(&Suite { ike: "aes192-sha384-ecp384", esp: "aes192-sha384", ..Suite::default() });
}

#[test]
fn aes_cbc_with_hmac_sha2_512() {
    both_roles(&Suite { ike: "aes256-sha512-ecp521", esp: "aes256-sha512", ..Suite::default() });
}

#[test]
fn chacha20_poly1305() {
    both_roles(&Suite { ike: "chacha20poly1305-prfsha256-x25519", esp: "chacha20poly1305", ..Suite::default() });
}

// RFC 4309, 5282; RFC 4494, 4615; RFC 6954.
#[test]
fn aes_ccm_and_cmac() {
    both_roles(&Suite { ike: "aes128ccm16-prfaescmac-ecp256", esp: "aes128ccm8", ..Suite::default() });
    both_roles(&Suite { ike: "aes256ccm8-prfsha256-ecp256bp", esp: "aes128-aescmac", ..Suite::default() });
}

// RFC 3686, 5930; RFC 3526 §6.
#[test]
fn aes_ctr() {
    both_roles(&Suite { ike: "aes128ctr-sha256-modp6144", esp: "aes256ctr-sha512", ..Suite::default() });
}

// RFC 4106 §6, RFC 5282.
#[test]
fn aes_gcm_with_a_short_icv() {
    both_roles(&Suite { ike: "aes256gcm12-prfsha256-ecp384bp", esp: "aes128gcm8", ..Suite::default() });
}

// RFC 2410.
#[test]
fn esp_without_encryption() {
    both_roles(&Suite { esp: "null-sha256", ..Suite::default() });
}

#[test]
fn modp_groups() {
    for ike in ["aes128gcm16-prfsha256-modp2048", "aes256gcm16-prfsha512-modp3072", "aes256-sha256-modp4096"] {
        both_roles(&Suite { ike, esp: "aes256gcm16", ..Suite::default() });
    }
}

#[test]
fn ecdsa_p256_certificates() {
    both_roles(&Suite { auth: Auth::Certificates(&rcgen::PKCS_ECDSA_P256_SHA256), ..Suite::default() });
}

#[test]
fn ecdsa_p384_certificates() {
    both_roles(&Suite { auth: Auth::Certificates(&rcgen::PKCS_ECDSA_P384_SHA384), ..Suite::default() });
}

#[test]
fn ed25519_certificates() {
    both_roles(&Suite { auth: Auth::Certificates(&rcgen::PKCS_ED25519), ..Suite::default() });
}

#[test]
fn rsa_certificates_in_fragments() {
    // RSA certificates do not fit in 1,280 octets together: RFC 7383 §2.5 is at work both ways.
    for (initiator, responder) in ROLES {
        let scene = Scene::works(
            initiator,
            responder,
            &Suite { auth: Auth::Certificates(&rcgen::PKCS_RSA_SHA256), ..Suite::default() },
        );
        let strongswan = if initiator == Strongswan { &scene.a } else { &scene.b };
        assert!(strongswan.log().contains("received fragment #1"), "{}", strongswan.log());
    }
}

// RFC 7296 §1.2: the initiator's guess of the key exchange method was wrong.
#[test]
fn invalid_ke_payload_is_retried() {
    for (initiator, responder) in ROLES {
        let (host_a, host_b) = hosts();
        let [(of_a, files_a), (of_b, files_b)] =
            configurations(&Suite { ike: "aes256gcm16-prfsha384-x25519-ecp384", ..Suite::default() });
        let of_b = of_b.replace("-x25519-ecp384", "-ecp384");
        let b = latchkey_tests::daemon::Daemon::start(responder, &host_b, &of_b, &files_b);
        let a = latchkey_tests::daemon::Daemon::start(initiator, &host_a, &of_a, &files_a);
        a.initiate("net");
        let scene = Scene { a, b, host_a, host_b };
        scene.passes();
    }
}

// RFC 7296 §2.8: a new Child SA takes over, the old one goes.
#[test]
fn child_sa_is_rekeyed_by_either_side() {
    for (initiator, responder) in ROLES {
        let scene = Scene::works(initiator, responder, &Suite { esp: "aes128gcm16-x25519", ..Suite::default() });
        for daemon in [&scene.a, &scene.b] {
            let before = daemon.child_spis("INSTALLED");
            assert_eq!(before.len(), 1);
            daemon.control(&["--rekey", "--child", "net"]);
            wait_for("a new SPI", Duration::from_secs(30), || {
                let now = daemon.child_spis("INSTALLED");
                now.len() == 1 && now != before
            });
            scene.passes();
        }
    }
}

// RFC 7296 §2.8 and §2.18.
#[test]
fn ike_sa_is_rekeyed_by_either_side() {
    for (initiator, responder) in ROLES {
        let scene = Scene::works(initiator, responder, &Suite::default());
        for daemon in [&scene.a, &scene.b] {
            let spi = |sas: &str| sas.split("initiator-spi=").nth(1).map(|rest| rest[..16].to_owned());
            let before = spi(&daemon.sas());
            daemon.control(&["--rekey", "--ike", "site"]);
            wait_for("a new IKE SA", Duration::from_secs(30), || {
                let sas = daemon.sas();
                sas.matches("initiator-spi=").count() == 1 && spi(&sas) != before && daemon.established() == 1
            });
            scene.passes();
        }
    }
}

// RFC 7296 §1.4.1.
#[test]
fn sas_are_deleted_by_either_side() {
    for (initiator, responder) in ROLES {
        for ours in [true, false] {
            let scene = Scene::works(initiator, responder, &Suite::default());
            let (one, other) = if ours { (&scene.a, &scene.b) } else { (&scene.b, &scene.a) };
            one.control(&["--terminate", "--child", "net"]);
            wait_for("the Child SA is gone", Duration::from_secs(30), || {
                one.child_spis("INSTALLED").is_empty() && other.child_spis("INSTALLED").is_empty()
            });
            assert_eq!((one.established(), other.established()), (1, 1), "the IKE SA stays");
            assert!(!scene.host_a.pings(INNER_A, INNER_B));
            one.control(&["--terminate", "--ike", "site"]);
            wait_for("the IKE SA is gone", Duration::from_secs(30), || {
                one.established() == 0 && other.established() == 0
            });
        }
    }
}

#[test]
fn wrong_psk_is_refused() {
    for (initiator, responder) in ROLES {
        let scene = Scene::start(initiator, responder, &Suite::default());
        let [(of_a, files_a), _] = configurations(&Suite::default());
        scene.a.write(&of_a.replace("a shared key for tests", "another key"), &files_a);
        scene.a.control(&["--load-all"]);
        let refused = scene.a.swanctl(&["--initiate", "--child", "net", "--timeout", "10"]);
        assert!(!refused.status.success());
        if initiator == Strongswan {
            assert!(scene.a.log().contains("received AUTHENTICATION_FAILED"), "{}", scene.a.output());
        } else {
            assert!(scene.b.log().contains("sending") || scene.b.log().contains("AUTH_FAILED"), "{}", scene.b.output());
        }
        assert_eq!((scene.a.established(), scene.b.established()), (0, 0));
        assert!(!scene.host_a.pings(INNER_A, INNER_B));
    }
}

#[test]
fn certificate_of_another_ca_is_refused() {
    let suite = Suite { auth: Auth::Certificates(&rcgen::PKCS_ECDSA_P256_SHA256), ..Suite::default() };
    for (initiator, responder) in ROLES {
        let scene = Scene::start(initiator, responder, &suite);
        let stranger = Authority::new("test CA", &rcgen::PKCS_ECDSA_P256_SHA256);
        let impostor = stranger.issue("a.example", &rcgen::PKCS_ECDSA_P256_SHA256);
        let [(of_a, _), _] = configurations(&suite);
        scene.a.write(
            &of_a,
            &vec![
                ("x509/cert.pem".into(), impostor.certificate),
                ("private/key.pem".into(), impostor.key),
                ("x509ca/stranger.pem".into(), stranger.certificate()),
            ],
        );
        scene.a.control(&["--load-all", "--clear"]);
        let refused = scene.a.swanctl(&["--initiate", "--child", "net", "--timeout", "10"]);
        assert!(!refused.status.success());
        assert!(scene.a.log().contains("AUTHENTICATION_FAILED"), "{}{}", scene.a.output(), scene.b.output());
        assert_eq!((scene.a.established(), scene.b.established()), (0, 0));
    }
}

#[test]
fn a_certificate_for_another_name_is_refused() {
    let suite = Suite { auth: Auth::Certificates(&rcgen::PKCS_ECDSA_P256_SHA256), ..Suite::default() };
    for (initiator, responder) in ROLES {
        let (host_a, host_b) = hosts();
        let [(of_a, files_a), (of_b, files_b)] = configurations(&suite);
        // B wants somebody else.
        let of_b = of_b.replace("id = a.example", "id = c.example");
        let b = latchkey_tests::daemon::Daemon::start(responder, &host_b, &of_b, &files_b);
        let a = latchkey_tests::daemon::Daemon::start(initiator, &host_a, &of_a, &files_a);
        let refused = a.swanctl(&["--initiate", "--child", "net", "--timeout", "10"]);
        assert!(!refused.status.success());
        assert!(a.log().contains("AUTHENTICATION_FAILED"), "{}{}", a.output(), b.output());
        assert_eq!((a.established(), b.established()), (0, 0));
    }
}

#[test]
fn no_common_proposal_is_refused() {
    for (initiator, responder) in ROLES {
        let scene = Scene::start(initiator, responder, &Suite::default());
        let [(of_a, files_a), _] = configurations(&Suite { ike: "aes128-sha256-modp2048", ..Suite::default() });
        scene.a.write(&of_a, &files_a);
        scene.a.control(&["--load-all"]);
        assert!(!scene.a.swanctl(&["--initiate", "--child", "net", "--timeout", "10"]).status.success());
        assert!(scene.a.log().contains("NO_PROPOSAL_CHOSEN"), "{}", scene.a.output());
        assert_eq!((scene.a.established(), scene.b.established()), (0, 0));
    }
}

// RFC 7296 §2.9: the responder narrows to what its policy allows.
#[test]
fn traffic_selectors_are_narrowed() {
    for (initiator, responder) in ROLES {
        let (host_a, host_b) = hosts();
        let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::default());
        let of_a = of_a.replace("remote_ts = 10.2.0.0/24", "remote_ts = 10.2.0.0/16");
        let b = latchkey_tests::daemon::Daemon::start(responder, &host_b, &of_b, &files_b);
        let a = latchkey_tests::daemon::Daemon::start(initiator, &host_a, &of_a, &files_a);
        a.initiate("net");
        assert!(a.sas().contains("remote-ts=[10.2.0.0/24]"), "{}", a.sas());
        let scene = Scene { a, b, host_a, host_b };
        scene.passes();
    }
}

// RFC 7296 §2.4: liveness checks find a peer that is gone.
#[test]
fn a_dead_peer_is_noticed() {
    let mut scene = Scene::works(Latchkey, Strongswan, &Suite { connection: "dpd_delay = 1s\n", ..Suite::default() });
    // The peer stays while it answers.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(scene.a.established(), 1);
    scene.b.signal("KILL");
    // Defaults: 4 s, five repetitions, 165 s; too long here, so it is enough that the check is under way.
    wait_for("a liveness check", Duration::from_secs(30), || scene.a.sas().contains("tasks-active="));
    assert!(!scene.b.is_running());
}

#[test]
fn what_the_peer_closes_comes_back_as_configured() {
    actions::close_actions(Latchkey, Strongswan);
}

#[test]
fn a_lost_peer_is_handled_as_configured() {
    actions::dpd_actions(Latchkey, Strongswan);
}
