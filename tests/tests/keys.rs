//! Several key exchanges, and post-quantum ones, between two Latchkeys (RFC 9370).

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::host::wait_for;
use latchkey_tests::scene::{Auth, INNER_A, INNER_B, Scene, Suite};

fn hybrid(auth: Auth, connection: &'static str) -> Suite {
    Suite {
        ike: "aes256gcm16-prfsha384-x25519-ke1_mlkem768",
        esp: "aes256gcm16-x25519-ke1_mlkem768",
        auth,
        connection,
        child: "",
    }
}

/// Rekeys both SAs from both sides, and sends packets through the last ones.
fn rekeys(scene: &Scene) {
    for daemon in [&scene.a, &scene.b] {
        let before = scene.a.child_spis("INSTALLED");
        daemon.control(&["--rekey", "--child", "net"]);
        wait_for("a new Child SA", Duration::from_secs(60), || {
            let now = scene.a.child_spis("INSTALLED");
            now.len() == 1 && now != before
        });
        // Its own key exchanges, as strongSwan 6 shows them.
        wait_for("the additional key exchange of the Child SA", Duration::from_secs(60), || {
            scene.a.sas().matches("ake1=ML_KEM_768").count() >= 2
        });
        let before = scene.a.sas();
        daemon.control(&["--rekey", "--ike", "site"]);
        let spis = |sas: &str| {
            sas.split_whitespace().find(|word| word.starts_with("initiator-spi=")).unwrap_or_default().to_owned()
        };
        wait_for("a new IKE SA", Duration::from_secs(60), || {
            scene.a.established() == 1 && scene.b.established() == 1 && spis(&scene.a.sas()) != spis(&before)
        });
        scene.passes();
    }
}

// RFC 9242, RFC 9370, RFC 7383: ML-KEM's messages in IKE fragments, over UDP.
#[test]
fn x25519_and_ml_kem_over_udp() {
    let scene = Scene::works(Latchkey, Latchkey, &hybrid(Auth::Psk, ""));
    let sas = scene.a.sas();
    assert!(sas.contains("dh-group=CURVE_25519") && sas.contains("ake1=ML_KEM_768"), "{sas}");
    rekeys(&scene);
    scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 2 << 20);
}

#[test]
fn x25519_and_ml_kem_with_certificates() {
    let scene = Scene::works(Latchkey, Latchkey, &hybrid(Auth::Certificates(&rcgen::PKCS_ECDSA_P256_SHA256), ""));
    rekeys(&scene);
}

// RFC 9329: over TCP, and ML-KEM alone, which may go in IKE_SA_INIT there.
#[test]
fn x25519_and_ml_kem_over_tcp() {
    let scene = Scene::works(Latchkey, Latchkey, &hybrid(Auth::Psk, "tcp = yes\n"));
    rekeys(&scene);
    let alone = Suite { ike: "aes256gcm16-prfsha384-mlkem1024", ..hybrid(Auth::Psk, "tcp = yes\n") };
    let scene = Scene::works(Latchkey, Latchkey, &alone);
    assert!(scene.a.sas().contains("dh-group=ML_KEM_1024"), "{}", scene.a.sas());
}
