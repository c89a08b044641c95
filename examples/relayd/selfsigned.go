package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// selfYears is how long a certificate that the relay made is good for. Who goes by its pin
// does not look.
const selfYears = 20

// selfSigned returns the certificate and key in a file, which it may make, for the given
// hosts, if it is not there. Only this user may read it.
func selfSigned(file string, hosts []string, mayMake bool, now time.Time) (tls.Certificate, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) && mayMake {
		if b, err = newSelfSigned(hosts, now); err == nil {
			err = create(file, b)
		}
		if errors.Is(err, fs.ErrExist) { // somebody was faster
			b, err = os.ReadFile(file)
		}
	}
	if err != nil {
		return tls.Certificate{}, err
	}
	cert, err := tls.X509KeyPair(b, b)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("%s: %w", file, err)
	}
	return cert, nil
}

// newSelfSigned returns a new certificate and its key, as PEM.
func newSelfSigned(hosts []string, now time.Time) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "relayd"},
		NotBefore:    now.Add(-24 * time.Hour), // for those whose clock is late
		NotAfter:     now.AddDate(selfYears, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: cert})
	pem.Encode(&b, &pem.Block{Type: "PRIVATE KEY", Bytes: private})
	return b.Bytes(), nil
}

// create makes a file, whole or not at all, that only this user may read. One that is there
// already is an error that matches fs.ErrExist.
func create(file string, b []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(file), ".relayd-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(b)
	if e := tmp.Sync(); err == nil {
		err = e
	}
	if e := tmp.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	return os.Link(tmp.Name(), file)
}
